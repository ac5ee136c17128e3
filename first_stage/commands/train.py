"""The command `first-stage train`: trains, and says what was made and what comes next."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from first_stage.command_line import command_line
from first_stage.config import Config, parse_config
from first_stage.handover.card import load_lines
from first_stage.training.loop import train
from first_stage.training.plan import plan
from first_stage.training.run_folder import holds_run, resume_command
from latent_tools.read.paired import CachedLatents


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, and say what was made and what comes next.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    config = parse_config(given)
    latents = None if config.data.latents is None else CachedLatents(config.data.latents)
    if config.plan:
        plan(config, latents)
        if PartialState().is_main_process:
            print(f"Nothing was trained. {how_to_start(config, without_plan(given))}")
        return
    outcome = train(config, latents)
    if not PartialState().is_main_process:
        return
    folder = Path(config.output_dir)
    if not outcome.finished and outcome.step == 0:
        print("stopped before a step was done; nothing is lost. Start the same command again")
        return
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
    made = json.loads((folder / "export/config.json").read_text())
    loading = "\n  ".join(load_lines(made, str(folder / "export")))
    pictures = sorted((folder / "pictures").glob("step-*.png"))
    print(
        f"export  {folder}/export\n"
        f"grid    {pictures[-1]}\n"
        f"gif     {folder}/training.gif\n"
        f"report  {folder}/report.html\n"
        "Load it with diffusers:\n"
        f"  {loading}\n"
        "Cache a data set's latents with it:\n"
        f"  {cache_command(config, outcome.processes)}"
    )


def how_to_start(config: Config, given: Sequence[str]) -> str:
    """The command that starts what was planned, and what it would replace.

    Args:
        config: The run's configuration.
        given: Its command line, without the plan.
    """
    if config.overwrite or config.resume is not None or not holds_run(Path(config.output_dir)):
        return f"Start it with:\n  {command_line('train', *given)}"
    return (
        f"output_dir {config.output_dir!r} holds a run, which is as it was: go on with it "
        "(--resume latest), choose another folder, or replace it with:\n"
        f"  {command_line('train', *given, '--overwrite', 'true')}"
    )


def cache_command(config: Config, processes: int) -> str:
    """The command that caches the latents of the data that was trained on.

    Args:
        config: The run's configuration.
        processes: How many trained.
    """
    folder, data = Path(config.output_dir), config.data
    line = ["--first_stage", folder / "export", "--data.path", data.path]
    if data.streaming:
        line += ["--data.streaming", "true"]
    return command_line("cache", *line, "--output", folder / "latents", processes=processes)


def without_plan(arguments: Sequence[str]) -> list[str]:
    """A command line without `--plan true`.

    Args:
        arguments: The command line.
    """
    left = [argument for argument in arguments if not argument.startswith("--plan=")]
    if "--plan" in left:
        place = left.index("--plan")
        del left[place : place + 2]
    return left
