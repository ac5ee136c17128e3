"""Precompute the latents of a data set: `first-stage cache`, in a clone.

accelerate launch scripts/cache_latents.py --first_stage DIR --data.path DATA --output CACHE
"""

import sys

from first_stage.__main__ import main

if __name__ == "__main__":
    main(["cache", *sys.argv[1:]])
