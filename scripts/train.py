"""Train a first stage: `first-stage train`, in a clone.

accelerate launch scripts/train.py --config configs/demo.yaml
"""

import sys

from first_stage.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
