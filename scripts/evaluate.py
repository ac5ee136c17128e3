"""Measure first stages, and make the report to look at.

    python scripts/evaluate.py --first_stage DIR --data.path DATA --output DIR

Also under `accelerate launch`, on several processes, with the same result.
"""

from first_stage.commands.evaluate import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
