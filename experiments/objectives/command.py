"""The command `python -m experiments.objectives`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.objectives.experiment import Experiment, Photos, Result
from experiments.objectives.measures import LocalFeatures
from experiments.objectives.photos import packaged_photos, shrunk, tiles
from experiments.objectives.results import figure, stripes_table, table, verdicts
from experiments.objectives.rows import BUDGETS, START, VGG, Budget, Size, row_names
from experiments.objectives.stripes import feature_ratio, pixel_ratio, stripes
from first_stage.command_line import command_line
from first_stage.config.parsing import plain_parser
from first_stage.data import Source, open_source
from first_stage.errors import ConfigError
from first_stage.evaluation.grids import save_png
from first_stage.files import write_json, write_text

_CHANNELS = 3
_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "quick": (
        {"action": "store_true"},
        "The short comparison: all objectives within 15 minutes on 2 CPU cores.",
    ),
    "small": (
        {"action": "store_true"},
        "The README's comparison. Without --quick and --small: the full one, for a GPU.",
    ),
    "seeds": (
        {"nargs": "+", "type": int, "default": [0]},
        "Seeds, separated by spaces; everything but the photos follows from them.",
    ),
    "rows": (
        {"nargs": "+", "type": str, "default": None},
        "Which objectives, separated by spaces; null: all for which there are weights.",
    ),
}


@dataclass(frozen=True)
class Options:
    """What to compare, on what, and for how long. The help of the first flags is in `_FLAGS`."""

    output: str = "runs/comparison"
    """Folder for the results. Finished ones in it are kept: a run that was cut off goes on."""
    quick: bool = False
    small: bool = False
    seeds: Sequence[int] = (0,)
    rows: Sequence[str] | None = None
    data: str | None = None
    """Photos to train on: a folder or a data set id; null: photos that come with packages."""
    held_out: str | None = None
    """Photos to measure on, with --data."""
    more: str | None = None
    """Further photos to train on: a folder or a data set id."""
    side: int = 144
    """Shorter side that all photos are shrunk to, in pixels."""
    tile: int = 72
    """Side of the held-out tiles, in pixels; a multiple of 8."""
    vgg: str | None = None
    """Weights of VGG16 for the pretrained perceptual distance (.safetensors, .pth or a hub id)."""
    threads: int | None = None
    """CPU threads; null: one for each core."""
    steps: int | None = None
    """Steps of each objective; null: as the size of the comparison says."""
    warmup_steps: int | None = None
    """Steps of the shared warm-up; null: likewise."""
    decay_steps: int | None = None
    """Steps at the end over which the learning rates fall; null: likewise."""


def main() -> None:
    """Train every objective, measure it, and print the table."""
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    output = Path(options.output)
    budget = make_budget(options)
    photos = open_photos(options)
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
    parser = plain_parser("Compare objectives: same photos, same first stage, same images seen.")
    for name, (kind, words) in _FLAGS.items():
        parser.add_argument(f"--{name}", help=words, **kind)
    parser.add_class_arguments(Options, nested_key=None, as_group=False, skip=set(_FLAGS))
    options = Options(**vars(parser.instantiate_classes(parser.parse_args(arguments))))
    for problem in _problems(options):
        raise ConfigError(problem)
    return options


def _problems(o: Options) -> list[str]:
    found = []
    if o.quick and o.small:
        found.append("--quick and --small are two sizes of the comparison: choose one")
    if min(o.seeds) < 0 or len(set(o.seeds)) < len(o.seeds):
        found.append(f"--seeds is {list(o.seeds)}: seeds are different and at least 0")
    if (o.data is None) != (o.held_out is None):
        found.append("--data and --held_out go together: photos to train on and photos to measure")
    if o.tile % 8 or o.tile > o.side or o.tile <= 0:
        found.append(f"--tile ({o.tile}) must be a multiple of 8 and at most --side ({o.side})")
    known = row_names(pretrained=True)
    for row in o.rows or ():
        if row not in known:
            found.append(f"--rows names {row!r}; there are: {', '.join(known)}")
        if row == VGG and o.vgg is None:
            found.append(f"--rows names {VGG!r}, which needs --vgg with the weights of VGG16")
    if o.threads is not None and o.threads < 1:
        found.append(f"--threads is {o.threads}; it must be above 0")
    return found


def make_budget(options: Options) -> Budget:
    """The steps and sizes that the options ask for."""
    size: Size = "quick" if options.quick else "small" if options.small else "full"
    budget = BUDGETS[size]
    given = {
        name: getattr(options, name)
        for name in ("steps", "warmup_steps", "decay_steps")
        if getattr(options, name) is not None
    }
    return dataclasses.replace(budget, **given)


def chosen_rows(options: Options) -> list[str]:
    """The rows of the table, in its order; the warm-up's is always there."""
    rows = row_names(options.vgg is not None)
    wanted = options.rows
    return rows if wanted is None else [row for row in rows if row in {START, *wanted}]


def open_photos(options: Options) -> Photos:
    """The photos, decoded and shrunk."""
    if options.data is not None and options.held_out is not None:
        training: Source = open_source(options.data, None, "train", "train")
        held_out: Source = open_source(options.held_out, None, "validation", "validation")
    else:
        training, held_out = packaged_photos()
    shown, names = tiles(shrunk([held_out], options.side, _CHANNELS), options.tile, _CHANNELS)
    sources = [training]
    if options.more is not None:
        sources.append(open_source(options.more, None, "train", "train"))
    return Photos(shrunk(sources, options.side, _CHANNELS), shown, names)


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
    return feature_ratio([[network(x.to(device))] for x in stripes(_CHANNELS)])


def _say(line: str) -> None:
    print(line, flush=True)
