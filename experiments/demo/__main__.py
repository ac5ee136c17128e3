"""`python -m experiments.demo --first_stage runs/demo/export`."""

from experiments.demo.figures import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
