"""`python -m experiments.debian_photos --output runs/debian-photos`."""

from experiments.debian_photos.unpack import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
