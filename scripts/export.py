"""Write a first stage anew: `first-stage export`, in a clone.

python scripts/export.py --first_stage runs/demo/export --fold_statistics --output runs/demo/folded
"""

import sys

from first_stage.__main__ import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
