"""The command `python -m experiments.diffusability`."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.diffusability.diffusion import Budget
from experiments.diffusability.results import (
    Result,
    correlations,
    figure,
    table,
    verdicts,
)
from experiments.diffusability.yardstick import Images, Yardstick
from first_stage.commands import export
from first_stage.commands.evaluate import short_names
from first_stage.config.images import ImagesConfig
from first_stage.config.parsing import parse_config, read_options
from first_stage.config.types import PositiveInt
from first_stage.data import Source
from first_stage.data.builtin import NAMES
from first_stage.errors import ConfigError
from first_stage.evaluation.grids import save_png
from first_stage.files import write_json, write_text
from first_stage.metrics.feature_networks import EFFICIENTNET, load_feature_network
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder, training_resolution
from first_stage.training.loop import train

_HERE = Path(__file__).parent
AFTERWARDS = ("whiten", "keep_channels")
"""In a setting: options of `first-stage export`, with which its first stage is written anew."""
_SEVERAL = {
    "first_stage": "A diffusers folder or a hub id; several, separated by spaces, are compared. "
    "(type: list[str] | null)",
    "settings": "Names in settings_file, separated by spaces: a first stage is trained under each, "
    "for every seed. (type: list[str] | null)",
    "changes": "Fields of the recipe for all settings, as field=value, separated by spaces. "
    "(type: list[str] | null)",
    "seeds": "Seeds, separated by spaces. (type: list[int], default: 0)",
}


@dataclass(frozen=True)
class ComparedData(ImagesConfig):
    """The images: first stages are cached, and the transformer trained, on these."""

    path: str = "digits"
    resolution: PositiveInt | None = None
    """Side of a centre crop, in pixels; null: what the first stage was trained on."""


@dataclass(frozen=True)
class Options:
    """How well a small diffusion transformer learns the latents of first stages."""

    first_stage: list[str] | None = None
    settings: list[str] | None = None
    changes: list[str] | None = None
    seeds: list[str] | None = None
    output: str = "runs/diffusability"
    """Folder for first stages, caches and results. What is finished in it is kept."""
    settings_file: str = str(_HERE / "settings.yaml")
    """YAML with what each setting changes of the recipe."""
    recipe: str = str(_HERE / "digits.yaml")
    """The recipe that settings change."""
    data: ComparedData = field(default_factory=ComparedData)
    held_out: str | None = None
    """Images to reconstruct, as data.path; null: the held-out part of a built-in set, else the
    same."""
    label: str | None = "label"
    """Column with the class, an integer; where the data have none, nothing asks for classes."""
    network: str | None = EFFICIENTNET
    """Network for a Frechet distance, as evaluate's features; null: none."""
    baseline: str = "none"
    """What the others are held against."""
    budget: Budget = field(default_factory=Budget)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, measure, and print the table.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    options = parse_options(arguments)
    output = Path(options.output)
    stages = dict(_first_stages(options))
    seeds = [int(seed) for seed in options.seeds or ("0",)]
    results: dict[str, list[Result]] = {}
    yardstick: Yardstick | None = None
    for seed in seeds:
        for name, setting in stages.items():
            folder = _trained(options, name, seed) if setting else _named(options)[name]
            if yardstick is None:
                yardstick = _yardstick(options, folder)
                if (accuracy := yardstick.judge_accuracy()) is not None:
                    _say(f"the judge reads {accuracy:.1%} of the held-out real images right")
            result = Result(*yardstick.cell(name, folder, seed))
            results.setdefault(name, []).append(result)
            # Whoever looks in early, or stops it, has what is there.
            _write(output, results, options.baseline)
    folders = {name: output / name / f"seed-{seeds[0]}" for name in results}
    save_png(figure(folders), output / "samples.png")
    print(f"\n{(output / 'table.md').read_text(encoding='utf-8')}")
    print(f"table   {output}/table.md\nnumbers {output}/table.json\nsamples {output}/samples.png")


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read and check the command line.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    options: Options = read_options(Options, arguments, several=_SEVERAL)
    for problem in _problems(options):
        raise ConfigError(problem)
    return options


def _problems(o: Options) -> Iterator[str]:
    if not (o.first_stage or o.settings):
        yield "--first_stage and --settings are both missing: name first stages, or settings"
    for seed in o.seeds or ():
        if not seed.isdigit():
            yield f"--seeds has {seed!r}; seeds are whole numbers of 0 or above"
    for change in o.changes or ():
        if "=" not in change:
            yield f"--changes has {change!r}; write field=value, such as model.latent_channels=4"
    for file in (o.settings_file, o.recipe):
        if o.settings and not Path(file).is_file():
            yield f"{file!r} is no file"
    known = _settings(o) if o.settings else {}
    for name in o.settings or ():
        if name not in known:
            yield f"--settings names {name!r}; {o.settings_file} has: {', '.join(known)}"


def _settings(options: Options) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(Path(options.settings_file).read_text(encoding="utf-8")) or {}


def _first_stages(options: Options) -> Iterator[tuple[str, bool]]:
    """Names for the table, and whether each is a setting."""
    for name in options.settings or ():
        yield name, True
    for name in _named(options):
        yield name, False


def _named(options: Options) -> dict[str, str]:
    given = options.first_stage or []
    short = [name.replace("/", "-") for name in short_names(given)] if given else []
    return dict(zip(short, given, strict=True))


def _trained(options: Options, name: str, seed: int) -> str:
    """The export of a setting's first stage; trained where it is not there yet.

    A setting with options of the export is that of the same changes without them, written anew:
    it is trained once.
    """
    settings = _settings(options)
    afterwards = {key: value for key, value in settings[name].items() if key in AFTERWARDS}
    changes = {key: value for key, value in settings[name].items() if key not in AFTERWARDS}
    if not afterwards:
        return str(_exported(options, name, changes, seed))
    plain = next((other for other, made in settings.items() if made == changes), f"plain {name}")
    changed = _folder(options, name, seed) / "export"
    if not changed.exists():
        line = ["--first_stage", _exported(options, plain, changes, seed)]
        line += [f"--{key}={str(value).lower()}" for key, value in afterwards.items()]
        line += ["--output", changed, "--data.path", options.data.path]
        export.main(list(map(str, line)))
    return str(changed)


def _exported(options: Options, name: str, changes: dict[str, Any], seed: int) -> Path:
    folder = _folder(options, name, seed)
    if not (folder / "export" / "config.json").is_file():
        fields = {**changes, "seed": seed, "output_dir": folder}
        fields |= dict(change.split("=", 1) for change in options.changes or ())
        line = ["--config", options.recipe, "--resume", "latest"]
        for key, value in fields.items():
            line += [f"--{key}", "null" if value is None else str(value)]
        train(parse_config(line))
    return folder / "export"


def _folder(options: Options, name: str, seed: int) -> Path:
    return Path(options.output) / "first_stages" / name / f"seed-{seed}"


def _yardstick(options: Options, first_stage: str) -> Yardstick:
    data = options.data
    model = load_autoencoder(first_stage, field="--first_stage")
    resolution = data.resolution or training_resolution(first_stage, model)
    if resolution is None:
        raise ConfigError(
            "data.resolution is missing, and the first stage does not say what it was trained on"
        )
    training = data.open("train", say=_say)
    held_out: Source = training
    if options.held_out is not None:
        held_out = data.open_at(options.held_out, "validation", None, say=_say)
    elif data.path in NAMES:
        held_out = data.open("validation", say=_say)
    label = options.label if options.label in training.columns else None
    if label is None and options.network is None:
        raise ConfigError(
            f"--network is null, and {data.path!r} has no column {options.label!r} for a judge to "
            "learn: samples could not be held against anything. Name a network, or the column"
        )
    images = Images(training, held_out, data, resolution, FirstStage(model).in_channels, label)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_feature_network(options.network, device) if options.network else None
    return Yardstick(images, options.budget, Path(options.output), network, _say)


def _write(output: Path, results: dict[str, list[Result]], baseline: str) -> None:
    text = [table(results), "", *verdicts(results, baseline), "", *correlations(results), ""]
    write_text(output / "table.md", "\n".join(text))
    numbers = {n: [dataclasses.asdict(r) for r in found] for n, found in results.items()}
    write_json(output / "table.json", numbers)


def _say(line: str) -> None:
    print(line, flush=True)
