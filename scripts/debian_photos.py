"""Unpack free photos that come with Debian packages, to train on.

python scripts/debian_photos.py --output runs/debian-photos
"""

from first_stage.comparison.debian import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
