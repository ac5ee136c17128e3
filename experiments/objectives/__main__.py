"""Compare objectives on the same photos, with the same first stage and the same number of images.

python -m experiments.objectives --quick
"""

from experiments.objectives.command import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
