"""Train a first stage: `accelerate launch scripts/train.py --config configs/demo.yaml`."""

from first_stage.commands.train import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
