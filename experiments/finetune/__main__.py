"""Fine-tune the decoder of a first stage trained on photos, for digits, and measure what it brings.

python -m experiments.finetune
"""

from experiments.finetune.command import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
