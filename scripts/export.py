"""Write a first stage anew: with the latents' statistics folded into its weights.

python scripts/export.py --first_stage runs/demo/export --fold_statistics --output runs/demo/folded
"""

from first_stage.commands.export import main
from first_stage.errors import run_command

if __name__ == "__main__":
    run_command(main)
