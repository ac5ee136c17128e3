"""Precompute the latents of a data set: exactly once each, resumable, tied to the weights.

accelerate launch scripts/cache_latents.py --first_stage DIR --data.path DATA --output CACHE
"""

from first_stage.commands.cache import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
