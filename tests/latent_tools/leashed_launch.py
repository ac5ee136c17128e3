"""`cache_latents.py` whose processes stand still after eight units, so that a kill finds them."""

import sys

from cache_helpers import stand_still

from first_stage.commands.cache import main

if __name__ == "__main__":
    stand_still(after_units=8)
    main(sys.argv[1:])
