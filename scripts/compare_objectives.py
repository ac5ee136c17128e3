"""Compare objectives on the same photos, with the same first stage and the same number of images.

python scripts/compare_objectives.py --quick
"""

from first_stage.comparison.command import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
