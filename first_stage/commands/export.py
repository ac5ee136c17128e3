"""The command `first-stage export`: a first stage in the file or folder that a program needs."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from first_stage.command_line import command_line
from first_stage.commands.standard_latents import ExportData, Measured, fewer, images, standard
from first_stage.config.parsing import read_options
from first_stage.config.types import PositiveFloat, PositiveInt
from first_stage.errors import ConfigError
from first_stage.files import make_writable, write_folder, write_json, write_text
from first_stage.handover.card import load_lines_of, padding_remark
from first_stage.handover.public import public_name
from first_stage.handover.single_file import programs, put_into, write_single_file
from first_stage.models.carriers import set_scale
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import STATISTICS_FILE, load_autoencoder

_SWITCHES = {"--fold_statistics": "true", "--whiten": "true"}


@dataclass(frozen=True)
class Options:
    """Write a first stage anew: as the file that a program reads, or with standard latents."""

    first_stage: str = ""
    """A diffusers folder, a pipeline's folder, a single file or whole checkpoint, or a hub id."""
    output: str = ""
    """The folder to write, or the file; it must not be there yet."""
    layout: Literal["diffusers", "ldm"] = "diffusers"
    """diffusers: a folder. ldm: one .safetensors with latent diffusion's names, for the programs
    people draw with; the output and the card say for which."""
    half: Literal["fp16", "bf16"] | None = None
    """Write weights in half precision, and say what that changes; null: float32."""
    into: str | None = None
    """Write a copy of this whole checkpoint (.safetensors) in which the first stage is this one;
    every other byte stays, and so do the types of the weights."""
    scaling_factor: PositiveFloat | None = None
    """What pipelines multiply the latents by, where the file does not say; null: as it says."""
    shift_factor: float | None = None
    """What they subtract before; null: as it says."""
    fold_statistics: bool = False
    """Fold the per-channel mean and standard deviation of the latents into the 1x1 convolutions:
    the same reconstructions, latents with mean 0 and variance 1, scaling_factor 1, no shift."""
    whiten: bool = False
    """Instead, fold the whole covariance of the latents into them: channels that do not repeat each
    other, the most signal first. Measured on images or a cache; each channel's posterior noise
    becomes its average."""
    keep_channels: PositiveInt | None = None
    """Leave all latent channels but the first so many out, after whitening or folding: for a first
    stage that learned with disturb.prefix, or with whiten, which puts the most signal first. With
    data.path it says what that costs."""
    latents: str | None = None
    """To whiten or fold: take the statistics of this cache, which the first stage made."""
    data: ExportData = field(default_factory=ExportData)
    """To whiten or fold: or measure them on these images."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Change what is to be changed, write, and say what came of it.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    options = parse_options(arguments)
    if Path(options.output).exists():
        raise ConfigError(f"output {options.output!r} is already there: give another")
    vae = load_autoencoder(options.first_stage, field="--first_stage")
    carrier = FirstStage(vae).family.carrier
    make_writable(Path(options.output).parent, f"--output {options.output!r}")
    set_scale(carrier, vae, options.scaling_factor, options.shift_factor)
    standing_card, known, words = None, _statistics_file(options), ""
    if options.fold_statistics or options.whiten:
        vae, standing_card, known = standard(_measured(options, vae), options.whiten)
    if options.keep_channels is not None:
        vae, known, words = fewer(_measured(options, vae), options.keep_channels, known)
    standing_card = (standing_card or _plain_card(options, vae)) + words
    if options.half is not None:
        rounded = in_half(copy.deepcopy(vae), options.half)
        print(f"half      {half_difference(options, vae, rounded)}")
        vae = rounded
    if options.into is not None:
        count, types = put_into(vae, Path(options.into), Path(options.output))
        print(
            f"export    {options.output}: a copy of {options.into} with {count:,} tensors replaced "
            f"({types}), every other byte as it was"
        )
        return
    if options.layout == "ldm":
        write_single_file(vae, Path(options.output))
        card_file = Path(options.output).with_suffix(".md")
        write_text(card_file, standing_card)
        print(f"export    {options.output}, card {card_file}\nread by   {programs(vae)}")
        return
    _write_folder(options, vae, standing_card, known)


def _write_folder(options: Options, vae: Any, text: str, known: dict[str, Any] | None) -> None:
    """The diffusers folder, and what comes next."""

    def write(folder: Path) -> None:
        vae.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if known is not None:
            write_json(folder / STATISTICS_FILE, known)

    write_folder(Path(options.output), write)
    loading = "\n  ".join(load_lines_of(vae, options.output))
    print(
        f"export    {options.output} ({_scale_in_words(vae)})\nLoad it with diffusers:\n  {loading}"
    )
    if options.fold_statistics or options.whiten or options.keep_channels:
        cache = ("--first_stage", options.output, "--data.path", "DATA", "--output", "CACHE")
        print(
            "Latents cached with the first stage as it was belong to that one; cache anew:\n"
            f"  {command_line('cache', *cache, processes=1)}"
        )


def _scale_in_words(vae: Any) -> str:
    """What pipelines do to its latents."""
    carrier = FirstStage(vae).family.carrier
    if carrier.channels_in is not None:
        return f"mean and deviation of each channel in {carrier.channels_in}".replace("`", "")
    scaling, shift = carrier.read(vae)
    shown = "no shift" if shift == 0 else f"shift_factor {shift:g}"
    return f"scaling_factor {scaling:g}, {shown}"


def _measured(options: Options, vae: Any) -> Measured:
    """The first stage, and where the statistics of its latents come from."""
    return Measured(options.first_stage, vae, options.latents, options.data)


def _statistics_file(options: Options) -> dict[str, Any] | None:
    """What was measured of the first stage's latents, which stay as they are."""
    file = Path(options.first_stage) / STATISTICS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def in_half(vae: Any, kind: Literal["fp16", "bf16"]) -> Any:
    """A first stage with rounded weights.

    Raises:
        ConfigError: When one of them overflows.
    """
    rounded = vae.to(torch.float16 if kind == "fp16" else torch.bfloat16)
    for name, value in rounded.state_dict().items():
        if not bool(value.isfinite().all()):
            raise ConfigError(
                f"half is {kind}, but {name} does not fit into it: its range ends at 65,504. Use "
                "bf16, or keep float32"
            )
    return rounded


@torch.no_grad()
def half_difference(options: Options, vae: Any, rounded: Any) -> str:
    """What rounding the weights changes on images, or on smooth random ones, in float32.

    Args:
        options: With the images, where some are named.
        vae: The first stage as it was.
        rounded: The same, with rounded weights.
    """
    stage = FirstStage(vae)
    factor = stage.downsample_factor
    if options.data.path is not None:
        shown, where = next(images(_measured(options, stage.model))), "images"
    else:
        draw = torch.Generator().manual_seed(0)
        coarse = torch.rand(2, stage.in_channels, 5, 5, generator=draw) * 2 - 1
        size = (8 * factor, 8 * factor)
        shown = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)
        where = "smooth random images (name some with --data.path)"
    latents = stage.encode(shown).latents
    before = stage.decode(latents)
    other = FirstStage(copy.deepcopy(rounded).float())
    moved = (other.encode(shown).latents - latents).square().mean().sqrt() / latents.std()
    error = (other.decode(latents) - before).square().mean().clamp_min(1e-20) / 4
    return (
        f"{options.half}: on {len(shown)} {where}, computed in float32, latents move by "
        f"{float(moved):.1e} of their standard deviation, and the same latents decode to images "
        f"{float(-10 * error.log10()):.1f} dB from before"
    )


def _plain_card(options: Options, vae: Any) -> str:
    """The card of a first stage that is only written anew."""
    stage = FirstStage(vae)
    loading = "\n".join(load_lines_of(vae, "this-folder"))
    return f"""# First stage f{stage.downsample_factor}, {stage.latent_channels} latent channels

`{public_name(options.first_stage)}`, a `{type(vae).__name__}`, written anew; its weights are
{f"rounded to {options.half}" if options.half else "float32"}. What pipelines do to its latents:
{_scale_in_words(vae)}.

{padding_remark(vae)}As one file in latent diffusion's layout it is read by: {programs(vae)}.
As a folder it is read by diffusers:

```python
{loading}
```
"""


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    options = read_options(Options, arguments, switches=_SWITCHES)
    for name in ("first_stage", "output"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is missing: see --help")
    if options.fold_statistics and options.whiten:
        raise ConfigError("--fold_statistics and --whiten are two ways: choose one")
    if options.into is not None and options.half is not None:
        raise ConfigError("half and into are both given: a checkpoint's weights keep their types")
    if (options.layout == "ldm" or options.into) and not options.output.endswith(".safetensors"):
        raise ConfigError(
            f"output is {options.output!r}: give the name of a file that ends in .safetensors"
        )
    return options
