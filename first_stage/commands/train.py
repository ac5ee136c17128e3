"""The command `train`: trains a first stage, and says what was made and what comes next."""

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from first_stage.config import parse_config
from first_stage.training.loop import train
from first_stage.training.run_folder import resume_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, and say what was made and what comes next.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    config = parse_config(arguments)
    outcome = train(config)
    if not PartialState().is_main_process:
        return
    folder = Path(config.output_dir)
    if not outcome.finished:
        print(
            f"stopped after step {outcome.step} of {config.train.max_steps}; everything is saved. "
            f"Go on with:\n  {resume_command(folder, outcome.processes)}"
        )
        return
    if outcome.metrics:
        found = outcome.metrics.items()
        numbers = ", ".join(f"{k.upper().replace('_', ' ')} {v:.4g}" for k, v in found)
        print(f"held out ({outcome.held_out} images): {numbers}")
    name = json.loads((folder / "export/config.json").read_text())["_class_name"]
    pictures = sorted((folder / "pictures").glob("step-*.png"))
    print(
        f"export  {folder}/export\n"
        f"grid    {pictures[-1]}\n"
        f"gif     {folder}/training.gif\n"
        f"report  {folder}/report.html\n"
        "Load it with diffusers:\n"
        f"  from diffusers import {name}\n"
        f'  vae = {name}.from_pretrained("{folder}/export")\n'
        "Cache a data set's latents with it:\n"
        f"  accelerate launch scripts/cache_latents.py --first_stage {folder}/export "
        f"--data.path {config.data.path} --output {folder}/latents"
    )
