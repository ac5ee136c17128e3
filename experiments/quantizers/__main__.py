"""Compare quantizers on the same photos, in the same network, for the same number of images.

python -m experiments.quantizers --quick
"""

from experiments.quantizers.command import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
