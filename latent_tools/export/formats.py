"""The formats: what each needs of a cache, and what writes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latent_tools.export.by_number import Edm2Writer, FastDitWriter
from latent_tools.export.by_sample_name import DcAeWriter, KohyaWriter, MarWriter, NpyWriter
from latent_tools.export.by_shard import DatasetsWriter, LightningDitWriter, WebDatasetWriter
from latent_tools.export.cache import ExportCache
from latent_tools.export.writer import Writer
from latent_tools.format.files import CacheError


@dataclass(frozen=True)
class Format:
    """A layout that a public trainer reads.

    Attributes:
        name: As `--format` has it.
        writer: Makes its writer from the cache and the output folder.
        hint: How to point the reader at `{output}`.
        needs_posterior: It holds moments.
        needs_flips: Its reader takes the flipped latent half of the time.
        needs_labels: Every sample needs an integer label.
        needs_square: All samples must have one square shape.
        is_scaled: Its values are multiplied with the scaling factor; its trainers know no shift.
        pixel_range: Range of the pixels in which its trainers encode and decode.
        layout: Downsample factor and latent channels that its trainers have built in.
        takes_tokens: It can hold numbers of codes.
    """

    name: str
    writer: Callable[[ExportCache, Path], Writer]
    hint: str
    needs_posterior: bool = False
    needs_flips: bool = False
    needs_labels: bool = False
    needs_square: bool = True
    is_scaled: bool = False
    pixel_range: tuple[int, int] = (-1, 1)
    layout: tuple[int, int] | None = None
    takes_tokens: bool = False


FORMATS: dict[str, Format] = {}
"""The formats by name; `register_format` adds one."""


def register_format(form: Format) -> None:
    """Make a format known to `export_cache` and to `export --format`."""
    FORMATS[form.name] = form


_BUILT_IN = (
    Format(
        "lightningdit", LightningDitWriter, "data.data_path: {output}",
        needs_flips=True, needs_labels=True,
    ),
    Format(
        "mar", MarWriter, "--use_cached --cached_path {output}",
        needs_posterior=True, needs_flips=True, needs_labels=True,
    ),
    Format(
        "fast-dit", FastDitWriter, "--feature-path {output}",
        needs_labels=True, is_scaled=True,
    ),
    Format(
        "edm2", Edm2Writer, "--data={output}",
        needs_posterior=True, needs_labels=True, pixel_range=(0, 1),
    ),
    Format(
        "repa", lambda cache, output: Edm2Writer(cache, output, "vae-sd", by_name=True),
        "--data-dir={output} (it reads the pictures from {output}/images, in the same order)",
        needs_posterior=True, needs_labels=True,
    ),
    Format(
        "dc-ae", DcAeWriter, "the latent data set's data_dir: {output}",
        needs_labels=True, is_scaled=True,
    ),
    Format(
        "kohya-sd", lambda cache, output: KohyaWriter(cache, output, "sd"),
        "train_data_dir = {output}, with --cache_latents_to_disk",
        needs_square=False, layout=(8, 4),
    ),
    Format(
        "kohya-sdxl", lambda cache, output: KohyaWriter(cache, output, "sdxl"),
        "train_data_dir = {output}, with --cache_latents_to_disk",
        needs_square=False, layout=(8, 4),
    ),
    Format(
        "npy", NpyWriter, "numpy.load of {output}/<id>.npy",
        needs_square=False, takes_tokens=True,
    ),
    Format(
        "webdataset", WebDatasetWriter, "webdataset.WebDataset over {output}/*.tar",
        needs_square=False, is_scaled=True, takes_tokens=True,
    ),
    Format(
        "datasets", DatasetsWriter, 'datasets.load_dataset("{output}")',
        needs_square=False, takes_tokens=True,
    ),
)  # fmt: skip

for _form in _BUILT_IN:
    register_format(_form)


def check(form: Format, cache: ExportCache, ignores_pixel_range: bool) -> None:
    """Refuse what the cache cannot give.

    Raises:
        CacheError: Saying what is missing, and what would give it.
    """
    where = repr(str(cache.path))
    manifest = cache.manifest
    if manifest.holds_tokens and not form.takes_tokens:
        takers = ", ".join(name for name, other in FORMATS.items() if other.takes_tokens)
        raise CacheError(
            f"{form.name} holds latents, but {where} stores tokens: export them as {takers}, or "
            "make the cache with --representation mean"
        )
    if form.needs_posterior and not cache.has_posterior:
        raise CacheError(
            f"{form.name} holds the posterior's mean and spread, but {where} stores "
            f"{manifest.representation} alone: make the cache with --representation moments"
        )
    if form.needs_flips and not cache.has_flips:
        raise CacheError(
            f"{form.name} takes the flipped image's latents half of the time, and {where} has none "
            "(a mirrored latent is not one): make the cache with --flip true"
        )
    if form.needs_labels and cache.labels is None:
        raise CacheError(
            f"{form.name} needs an integer label for every sample, and {where} has none (columns: "
            f"{', '.join(cache.dataset.column_names) or 'none'}): make the cache from class "
            "folders, or carry a column label"
        )
    shapes = cache.shapes
    if form.needs_square and (len(shapes) > 1 or shapes[0][0] != shapes[0][1]):
        names = ", ".join(f"{h}x{w}" for h, w in shapes)
        raise CacheError(
            f"{form.name} reads latents of one square shape, and {where} has {names}: make the "
            "cache without --buckets, or export as webdataset or datasets"
        )
    stage = manifest.first_stage
    has = (stage["downsample_factor"], stage["latent_channels"])
    if form.layout is not None and has != form.layout:
        raise CacheError(
            f"{form.name} is for first stages with downsample factor {form.layout[0]} and "
            f"{form.layout[1]} latent channels; {where} was made with factor {has[0]} and {has[1]} "
            "channels"
        )
    stored = tuple(manifest.preprocessing["pixel_range"])
    if stored != form.pixel_range and not ignores_pixel_range:
        raise CacheError(
            f"{form.name}'s trainers encode and decode pixels in {list(form.pixel_range)}, and "
            f"{where} was made from pixels in {list(stored)}: decoded as they do, images would "
            "come out wrong. Where you decode yourself, add --any_pixel_range true"
        )
