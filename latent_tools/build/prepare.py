"""Before the first encode: is this the same cache, the same data, and what is new?"""

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import torch

from first_stage.config.types import misfits
from first_stage.data import Reading, Source
from first_stage.files import TEMPORARY
from first_stage.models.discrete import Discrete
from latent_tools.build.checked import CHECKED, write_checked
from latent_tools.build.encoder import LatentEncoder
from latent_tools.build.follow import first_free_unit, follow, trim
from latent_tools.build.options import CacheOptions
from latent_tools.build.parquet import ParquetStream
from latent_tools.build.sizes import FOLDER as PLANNING
from latent_tools.build.sizes import forget_sizes, image_sizes
from latent_tools.build.stopped import STOPPED, forget_stop
from latent_tools.format.files import CacheError, LaunchLock
from latent_tools.format.manifest import (
    FILE,
    Manifest,
    describe_first_stage,
    describe_preprocessing,
    mismatches,
)
from latent_tools.format.plan import (
    IDS,
    Plan,
    Shape,
    committed_units,
    duplicate_id,
    kohya_bucket,
    nearest_bucket,
    parse_buckets,
)
from latent_tools.format.shards import (
    COMMITS,
    SHARDS,
    Dtype,
    TokenDtype,
    is_committed,
    read_commit,
    token_dtype,
)

_CARRIED = ("label", "labels", "cls", "class", "caption", "captions", "text", "txt", "prompt")
_SHARD_BYTES = 256 * 2**20
_LARGEST_UNIT = 1024
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1, "uint16": 2, "uint32": 4}


def source_ids(source: Source) -> pa.Array:
    """The ids of all samples."""
    return pa.array((source.id(index) for index in range(len(source))), IDS)


def _refuse_duplicates(source: Source, ids: pa.Array) -> None:
    if (repeated := duplicate_id(ids)) is not None:
        raise CacheError(
            f"data.path {source.name!r} has two samples with the id {repeated!r}: their latents "
            "could not be told apart"
        )


def describe_launch(source: Source, encoder: LatentEncoder, options: CacheOptions) -> Manifest:
    """What a launch would encode with, after checking the options against the first stage.

    Raises:
        CacheError: Naming the option that cannot work.
    """
    buckets = _check_options(options, encoder)
    representation = options.representation
    if representation is None:
        representation = "moments" if encoder.has_posterior else "mean"
    dtype: Dtype | TokenDtype = options.dtype
    bottleneck = encoder.first_stage.bottleneck
    if representation == "tokens" and isinstance(bottleneck, Discrete):
        dtype = token_dtype(len(bottleneck.usage))
    return Manifest(
        first_stage=describe_first_stage(encoder.first_stage, options.revision),
        preprocessing=describe_preprocessing(
            options.reading or Reading(encoder.first_stage.in_channels),
            options.resolution,
            options.resize if buckets is None else None,
            [list(shape) for shape in buckets] if buckets is not None else None,
        ),
        store={
            "representation": representation,
            "dtype": dtype,
            "flip": options.flip,
            "columns": list(_columns(source, options.columns)),
            "precision": encoder.precision,
            "seed": options.seed if representation == "sample" else None,
        },
        source={"path": source.name, **options.opened_with},
        made_with={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "pillow": PIL.__version__,
        },
        command=options.command,
    )


def _check_options(options: CacheOptions, encoder: LatentEncoder) -> list[Shape] | None:
    for problem in misfits(options):
        raise CacheError(problem)
    if options.representation in ("moments", "sample") and not encoder.has_posterior:
        raise CacheError(
            f"representation is {options.representation!r}, but this first stage has no posterior: "
            "leave representation out, or use mean, to store its latents"
        )
    factor = encoder.first_stage.downsample_factor
    if options.buckets is not None:
        return parse_buckets(options.buckets, options.resolution, factor)
    if options.resolution % factor:
        nearest = max(1, round(options.resolution / factor)) * factor
        raise CacheError(
            f"data.resolution {options.resolution} is no multiple of the first stage's downsample "
            f"factor {factor}: use {nearest}"
        )
    return None


def _columns(source: Source, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    if wanted is None:
        return tuple(name for name in source.columns if name in _CARRIED)
    for name in wanted:
        if name not in source.columns:
            raise CacheError(
                f"columns has {name!r}, but {source.name!r} has the columns: "
                f"{', '.join(source.columns) or 'none'}"
            )
    return wanted


def prepare(
    folder: Path,
    launch: Manifest,
    source: Source,
    ids: pa.Array,
    options: CacheOptions,
    say: Callable[[str], None],
) -> LaunchLock:
    """Make or check the cache's folder, and plan the samples that are new.

    Run by one process while the others wait.

    Args:
        folder: The cache.
        launch: What this launch would encode with.
        source: The data set.
        ids: Its ids.
        options: How.
        say: Called with lines for the user.

    Returns:
        The lock that keeps other launches off.

    Raises:
        CacheError: When the folder holds something else, was made with other weights,
            preprocessing or data, two samples share an id, or another launch is filling it.
    """
    _refuse_duplicates(source, ids)
    _check_folder(folder)
    for name in (SHARDS, COMMITS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lock = LaunchLock(folder)
    lock.take()
    plan = _plan(folder, say)
    is_begun = _is_begun(folder, plan)
    if (folder / FILE).exists() and (is_begun or not lock.is_held):
        cache = Manifest.load(folder)
        _check_same(folder, cache, launch, is_begun, say)
        _keep_classes(folder, cache, source)
        new = len(plan.new_ids(ids))
        if len(plan) and new:
            say(f"{new} samples are new since the last launch")
        followed = follow(folder, plan, source, ids, options.update, say)
    else:
        # What an earlier launch wanted binds nobody as long as nothing is encoded so.
        plan = Plan.empty()
        launch.save(folder)
        forget_stop(folder)
        write_checked(folder, time.time())  # whatever is encoded is read from now on
        _keep_classes(folder, launch, source)
        followed = plan
    positions = followed.new_ids(ids)
    if len(positions):
        names = ids.take(pa.array(positions))
        first = first_free_unit(folder, plan)
        _extended(followed, first, folder, launch, source, positions, names, options).save(folder)
        forget_sizes(folder)
    elif len(followed) < len(plan):
        followed.save(folder)
    trim(folder, Plan.load(folder))
    return lock


def _extended(
    plan: Plan, first: int, folder: Path, launch: Manifest, source: Source,
    positions: np.ndarray, names: pa.Array, options: CacheOptions,
) -> Plan:  # fmt: skip
    """The plan with the samples at these positions of the source, in units from `first` on."""
    buckets = launch.preprocessing["buckets"]
    if buckets is None:
        shapes = np.full((len(positions), 2), options.resolution)
        return plan.extend(names, shapes, options.unit_size or _unit_size(launch, shapes), first)
    reading = options.reading or Reading(launch.preprocessing["channels"])
    sizes = image_sizes(folder, source, positions, names, options.workers, reading)
    choose = kohya_bucket if options.buckets == "kohya" else nearest_bucket
    shapes = choose(sizes, [(h, w) for h, w in buckets])
    unit_size = options.unit_size or _unit_size(launch, shapes)
    if not isinstance(source, ParquetStream):
        return plan.extend(names, shapes, unit_size, first)
    # Units of all shapes for a stretch of row groups: whoever encodes them reads each group once.
    start = 0
    for count in source.stretches(positions, unit_size * len(buckets)):
        part = slice(start, start + count)
        plan = plan.extend(names[part], shapes[part], unit_size, first if start == 0 else None)
        start += count
    return plan


def _plan(folder: Path, say: Callable[[str], None]) -> Plan:
    """The plan that is there; made anew from the commits when its file was lost."""
    plan = Plan.load(folder)
    if len(plan) or not (folder / FILE).exists():
        return plan
    there = sorted(committed_units(folder))
    if not there:
        return plan
    say(f"the plan is not there: making it anew from {len(there)} commits")
    plan = Plan.of_units(_planned(folder, unit) for unit in there)
    plan.save(folder)
    return plan


def _planned(folder: Path, unit: int) -> tuple[int, Shape, list[str]]:
    commit = read_commit(folder, unit)
    ids = [*commit["ids"], *(failure["id"] for failure in commit["failures"])]
    return unit, (commit["height"], commit["width"]), ids


def _is_begun(folder: Path, plan: Plan) -> bool:
    """Whether any unit is committed; a directory that lags behind is asked by name too."""
    return any(True for _ in committed_units(folder)) or any(
        is_committed(folder, unit.number) for unit in plan.units
    )


def _keep_classes(folder: Path, cache: Manifest, source: Source) -> None:
    """Let classes keep their labels when folders come in between; new ones get the next."""
    keep = getattr(source, "keep_classes", None)
    if keep is None:
        return
    known = cache.source.get("classes")
    names = keep(_committed_classes(folder) if known is None else known)
    if names != known:
        cache.source["classes"] = names
        cache.save(folder)


def _check_folder(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise CacheError(
            f"output {str(folder)!r} is a link to {str(folder.readlink())!r}, which is not there: "
            "make that folder, or give another --output"
        )
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"output {str(folder)!r} is a file: give a folder")
    if folder.is_dir() and not (folder / FILE).exists():
        ours = {SHARDS, COMMITS, PLANNING, CHECKED, STOPPED, ".lock"}
        others = [
            path.name
            for path in folder.iterdir()
            if path.name not in ours and not path.name.startswith(TEMPORARY)
        ]
        committed = any(True for _ in committed_units(folder))
        if others or committed:
            found = sorted(others)[0] if others else COMMITS
            raise CacheError(
                f"output {str(folder)!r} is no latent cache but is not empty (it has {found!r}): "
                "give another folder"
            )


def _check_same(
    folder: Path, cache: Manifest, launch: Manifest, is_begun: bool, say: Callable[[str], None]
) -> None:
    if found := mismatches(cache, launch):
        advice = "give another --output, or the first stage and options that it was made with"
        if not is_begun:
            advice += (
                ". Nothing is encoded in it yet: when no other launch is filling it, which cannot "
                "be known on a file system without locks, delete that folder"
            )
        raise CacheError(
            f"the cache {str(folder)!r} was made differently: {'; '.join(found)}. Nothing was "
            f"changed: {advice}"
        )
    if cache.first_stage["decoder_sha256"] != launch.first_stage["decoder_sha256"]:
        say("the decoder differs from the cache's; the latents do not depend on it")
    for field in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        kept, now = cache.first_stage.get(field), launch.first_stage[field]
        if kept != now:
            say(f"the first stage's {field} is now {now}; the cache keeps {kept}")


def _committed_classes(folder: Path) -> list[str]:
    """Class names in the order of their labels, of a cache that does not say them itself."""
    labels: dict[str, int] = {}
    for unit in committed_units(folder):
        columns = read_commit(folder, unit)["columns"]
        labels |= dict(zip(columns.get("class", []), columns.get("label", []), strict=False))
    names = [name for name in labels if name is not None]
    return sorted(names, key=lambda name: labels[name])


def _unit_size(launch: Manifest, shapes: np.ndarray) -> int:
    factor = launch.first_stage["downsample_factor"]
    per_sample = (
        launch.tensor_channels
        * (2 if launch.representation == "moments" else 1)
        * (2 if launch.store["flip"] else 1)
        * _BYTES[launch.store["dtype"]]
        * int((shapes[:, 0] // factor * (shapes[:, 1] // factor)).max())
    )
    return max(1, min(_LARGEST_UNIT, _SHARD_BYTES // per_sample))
