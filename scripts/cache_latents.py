"""Precompute the latents of a data set: exactly once each, resumable, tied to the weights.

accelerate launch scripts/cache_latents.py --first_stage DIR --data.path DATA --output CACHE
"""

from first_stage.errors import run_command
from latent_tools.command import main

if __name__ == "__main__":
    run_command(main)
