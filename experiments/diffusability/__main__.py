"""Train the same small diffusion transformer on the latents of several first stages.

python -m experiments.diffusability --first_stage A B --data.path digits
"""

from experiments.diffusability.command import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
