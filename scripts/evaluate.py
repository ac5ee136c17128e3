"""Measure first stages, and make the report to look at: `first-stage evaluate`, in a clone.

    python scripts/evaluate.py --first_stage DIR --data.path DATA --output DIR

Also under `accelerate launch`, on several processes, with the same result.
"""

import sys

from first_stage.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
