"""The command `python -m experiments.finetune`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.diffusability.diffusion import Budget
from experiments.diffusability.yardstick import Images, Yardstick
from experiments.finetune.measure import SHEET, Found, cached, measure
from experiments.finetune.results import table
from first_stage.config.images import ImagesConfig
from first_stage.config.parsing import parse_config, read_options
from first_stage.files import write_json, write_text
from first_stage.metrics.feature_networks import load_feature_network
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.training.loop import train

_HERE = Path(__file__).parent
_SEVERAL = {
    "changes": "Fields of the fine-tuning recipe, as field=value, separated by spaces. "
    "(type: list[str] | null)",
    "seeds": "Seeds of the transformer, separated by spaces. (type: list[int], default: 0 1 2)",
}


@dataclass(frozen=True)
class Options:
    """A decoder fine-tuned on a foreign domain, and a diffusion model of the old latents."""

    output: str = "runs/finetune"
    """Folder for everything that is made; what is finished in it is kept."""
    first_stage: str | None = None
    """The first stage to begin from; null: one is trained on the built-in photos."""
    photos: str = str(_HERE / "photos.yaml")
    """The recipe of that one."""
    recipe: str = str(_HERE / "digits.yaml")
    """The fine-tuning recipe; its data are the domain, and need labels."""
    changes: list[str] | None = None
    seeds: list[str] | None = None
    network: str | None = None
    """Network for another Frechet distance, as evaluate's features; null: the judge alone."""
    budget: Budget = field(default_factory=Budget)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, measure, and print the table.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    options: Options = read_options(Options, arguments, several=_SEVERAL)
    output = Path(options.output)
    before = options.first_stage or _trained(options.photos, output / "photos", [])
    yardstick, config = _yardstick(options, before)
    dataset = cached(yardstick, before, output / "cache")  # before the decoder is touched
    changes = [f"model.pretrained={before}", *(options.changes or [])]
    after = _trained(options.recipe, output / "digits", changes)
    seeds = [int(seed) for seed in options.seeds or ("0", "1", "2")]
    found = measure(
        yardstick, dataset, before, after, config, seeds, output, lambda some: _write(some, output)
    )
    print(f"\n{table(found)}\ntable   {output}/table.md\nnumbers {output}/table.json")
    print(f"samples {output / SHEET}\nimages  {output}/evaluation/report.html")


def _trained(recipe: str, folder: Path, changes: Sequence[str]) -> str:
    """The export of a recipe's run; trained where it is not there yet."""
    if not (folder / "export" / "config.json").is_file():
        line = ["--config", recipe, "--output_dir", str(folder), "--resume", "latest"]
        for change in changes:
            name, _, value = change.partition("=")
            line += [f"--{name}", value]
        train(parse_config(line))
    return str(folder / "export")


def _yardstick(options: Options, before: str) -> tuple[Yardstick, ImagesConfig]:
    data = parse_config(["--config", options.recipe]).data
    config = ImagesConfig(path=data.path, resolution=data.resolution, resize=data.resize)
    stage = FirstStage(load_autoencoder(before, field="--first_stage"))
    network = load_feature_network(options.network, "cpu") if options.network else None
    images = Images(
        config.open("train"), config.open("validation"), config, data.resolution,
        stage.in_channels, "label",
    )  # fmt: skip
    return Yardstick(images, options.budget, Path(options.output), network, _say), config


def _write(found: Found, output: Path) -> None:
    write_text(output / "table.md", table(found))
    write_json(output / "table.json", dataclasses.asdict(found))


def _say(line: str) -> None:
    print(line, flush=True)
