"""The command `python -m experiments.objectives`."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.objectives import options as shared
from experiments.objectives.experiment import CHANNELS, Experiment, Result, open_photos
from experiments.objectives.measures import LocalFeatures
from experiments.objectives.results import figure, stripes_table, table, verdicts
from experiments.objectives.rows import BUDGETS, START, VGG, Budget, row_names
from experiments.objectives.stripes import feature_ratio, pixel_ratio, stripes
from first_stage.command_line import command_line
from first_stage.errors import ConfigError
from first_stage.evaluation.grids import save_png
from first_stage.files import write_json, write_text

_WORDS = {
    "quick": "The short comparison: all objectives within 15 minutes on 2 CPU cores.",
    "small": "The README's comparison. Without --quick and --small: the full one, for a GPU.",
    "seeds": "Seeds, separated by spaces; everything but the photos follows from them.",
    "rows": "Which objectives, separated by spaces; null: all for which there are weights.",
}


@dataclass(frozen=True)
class Options(shared.Options):
    """What to compare, on what, and for how long."""

    output: str = "runs/comparison"
    """Folder for the results. Finished ones in it are kept: a run that was cut off goes on."""
    data: str | None = None
    """Photos to train on: a folder or a data set id; null: photos that come with packages."""
    held_out: str | None = None
    """Photos to measure on, with --data."""
    side: int = 144
    """Shorter side that all photos are shrunk to, in pixels."""
    tile: int = 72
    """Side of the held-out tiles, in pixels; a multiple of 8."""
    vgg: str | None = None
    """Weights of VGG16 for the pretrained perceptual distance (.safetensors, .pth or a hub id)."""
    steps: int | None = None
    """Steps of each objective; null: as the size of the comparison says."""
    warmup_steps: int | None = None
    """Steps of the shared warm-up; null: likewise."""
    decay_steps: int | None = None
    """Steps at the end over which the learning rates fall; null: likewise."""


def main() -> None:
    """Train every objective, measure it, and print the table."""
    options = parse_options()
    options.set_threads()
    output, budget = Path(options.output), make_budget(options)
    photos = open_photos(
        options.more,
        data=options.data,
        held_out=options.held_out,
        side=options.side,
        tile=options.tile,
    )
    print(
        f"1 process on {torch.get_num_threads()} threads, {len(photos.training)} photos to train "
        f"on, {len(photos.held_out)} held-out tiles of {options.tile} pixels from "
        f"{len(set(photos.names))} photos\n{budget}",
        flush=True,
    )
    experiment = Experiment(photos, budget, output, _say, options.vgg)
    rows = chosen_rows(options)
    results: dict[str, list[Result]] = {row: [] for row in rows}
    for seed in options.seeds:
        for row in rows:
            results[row].append(experiment.result(row, seed))
        # Whoever looks in early, or stops it, has what is there.
        _write(output, {row: found for row, found in results.items() if found}, experiment)
    folders = {row: experiment.first_stage_folder(row, options.seeds[0]) for row in rows}
    save_png(figure(folders, photos), output / "comparison.png")
    print(f"\n{(output / 'comparison.md').read_text()}")
    print(f"table   {output}/comparison.md\nnumbers {output}/comparison.json")
    print(f"figure  {output}/comparison.png")
    best = folders.get("learned+hinge", folders[rows[-1]])
    look = ("--first_stage", best, "--data.path", "photos", "--output", output / "evaluation")
    print(f"Look at a first stage closely with:\n  {command_line('evaluate', *look)}")


def parse_options(arguments: list[str] | None = None) -> Options:
    """The options of the command line.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    description = "Compare objectives: same photos, same first stage, same images seen."
    options = shared.read(Options, description, _WORDS, arguments)
    for problem in _problems(options):
        raise ConfigError(problem)
    return options


def _problems(o: Options) -> Iterator[str]:
    yield from shared.problems(o, row_names(pretrained=True))
    if (o.data is None) != (o.held_out is None):
        yield "--data and --held_out go together: photos to train on and photos to measure"
    if o.tile % 8 or o.tile > o.side or o.tile <= 0:
        yield f"--tile ({o.tile}) must be a multiple of 8 and at most --side ({o.side})"
    if VGG in (o.rows or ()) and o.vgg is None:
        yield f"--rows names {VGG!r}, which needs --vgg with the weights of VGG16"


def make_budget(options: Options) -> Budget:
    """The steps and sizes that the options ask for."""
    given = {
        name: getattr(options, name)
        for name in ("steps", "warmup_steps", "decay_steps")
        if getattr(options, name) is not None
    }
    return dataclasses.replace(BUDGETS[options.size], **given)


def chosen_rows(options: Options) -> list[str]:
    """The rows of the table, in its order; the warm-up's is always there."""
    rows = row_names(options.vgg is not None)
    wanted = options.rows
    return rows if wanted is None else [row for row in rows if row in {START, *wanted}]


def _write(output: Path, results: dict[str, list[Result]], experiment: Experiment) -> None:
    others = {
        "mean squared error": pixel_ratio("l2"),
        "mean absolute error": pixel_ratio("l1"),
        "EfficientNet-Lite0, fifth block": _network_ratio(experiment.network),
    }
    text = [table(results), "", *verdicts(results), "", stripes_table(results, others), ""]
    write_text(output / "comparison.md", "\n".join(text))
    plain = {row: [dataclasses.asdict(r) for r in found] for row, found in results.items()}
    write_json(output / "comparison.json", {"rows": plain, "stripes": others})


def _network_ratio(network: LocalFeatures) -> float:
    device = next(network.parameters()).device
    return feature_ratio([[network(x.to(device))] for x in stripes(CHANNELS)])


def _say(line: str) -> None:
    print(line, flush=True)
