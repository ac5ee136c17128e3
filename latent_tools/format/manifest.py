"""What a cache was encoded with, and whether that is still what a launch would encode with.

The fingerprint covers what the latents depend on: every tensor of the encoder side, the part of the
config that changes latents, the preprocessing of the pixels, and what is stored how. The decoder's
hash is recorded beside it, so that a decoder trained on later is told apart from another encoder.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from first_stage.data import Reading
from first_stage.files import write_json
from latent_tools.format.files import CacheError, read_json

if TYPE_CHECKING:  # reading a cache needs no diffusers, whose import takes seconds in every worker
    from first_stage.models.first_stage import FirstStage

FILE = "manifest.json"
FORMAT = "first-stage latent cache"
VERSION = 1

Representation = Literal["moments", "mean", "sample", "tokens"]
"""What is stored: mean and log-variance of the posterior, its mean, or one draw from it; of a first
stage with a codebook the numbers of its codes, or, as `mean`, its latents before quantization."""

# What an autoencoder uses after the latents: changing it changes no latent. A codebook is among
# them because `VQModel.encode` gives the latents before they are quantised.
_DECODER_SIDE = ("decoder.", "post_quant_conv.", "quantize.")

# Config entries that change no latent: names and versions, what pipelines do with latents, and
# the decoder's own.
_CONFIG_IGNORED = re.compile(
    r"^(_.*|sample_size|scaling_factor|shift_factor|latents_mean|latents_std|force_upcast"
    r"|out_channels|up_.*|decoder_.*|.*_decoder|use_post_quant_conv|post_quant.*|num_vq_embeddings"
    r"|lookup_from_codebook|vq_embed_dim|latent_magnitude|latent_shift|mid_block_from_decoder)$"
)


@dataclass(frozen=True)
class WeightsFingerprint:
    """Hashes of an autoencoder's weights.

    Attributes:
        encoder: SHA-256 over name, type, shape and bytes of every tensor that latents depend on.
        decoder: The same for the other tensors.
        tensors: The first 16 hex digits of each encoder tensor's own hash, to name what differs.
    """

    encoder: str
    decoder: str
    tensors: dict[str, str]


def fingerprint_weights(autoencoder: nn.Module) -> WeightsFingerprint:
    """Hash an autoencoder's weights and buffers, apart for the encoder's and the decoder's side.

    Args:
        autoencoder: Any diffusers autoencoder; its dtype is part of the hash, so load it in
            float32 as `load_autoencoder` does.
    """
    sides = {True: hashlib.sha256(), False: hashlib.sha256()}
    tensors: dict[str, str] = {}
    for name, tensor in sorted(autoencoder.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
        is_encoder = not name.startswith(_DECODER_SIDE)
        sides[is_encoder].update(digest.digest())
        if is_encoder:
            tensors[name] = digest.hexdigest()[:16]
    return WeightsFingerprint(sides[True].hexdigest(), sides[False].hexdigest(), tensors)


def latent_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an autoencoder's config that change its latents, as JSON values."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in sorted(config.items())
        if not _CONFIG_IGNORED.match(key)
    }


def tensor_name(representation: Representation) -> str:
    """Name of the shards' main tensor."""
    return representation if representation in ("moments", "tokens") else "latents"


@dataclass
class Manifest:
    """`manifest.json`.

    Attributes:
        first_stage: Name, class, weights fingerprint, latent config, latent channels, downsample
            factor, and the scaling and shift that its pipelines apply.
        preprocessing: From file to what the encoder sees.
        store: Representation, dtype, flips, carried columns, precision of the encoder.
        source: Where the data was; moving it is no mismatch.
        made_with: Versions of the libraries; for the record.
        command: The command that made the cache, to be started again.
        counts: Samples and units; written by finalize.
        statistics: See `latent_tools.format.statistics`; written by finalize.
    """

    first_stage: dict[str, Any]
    preprocessing: dict[str, Any]
    store: dict[str, Any]
    source: dict[str, Any]
    made_with: dict[str, str]
    command: str
    counts: dict[str, int] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def representation(self) -> Representation:
        """What the shards hold."""
        return cast(Representation, self.store["representation"])

    @property
    def tensor_name(self) -> str:
        """Name of the shards' main tensor."""
        return tensor_name(self.representation)

    @property
    def tensor_channels(self) -> int:
        """Channels of which statistics are kept: the latents', or one of tokens."""
        return 1 if self.holds_tokens else int(self.first_stage["latent_channels"])

    @property
    def holds_tokens(self) -> bool:
        """Whether the shards hold numbers of codes."""
        return self.representation == "tokens"

    def save(self, folder: Path) -> None:
        """Write `manifest.json` atomically."""
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_json(folder / FILE, values, indent=1)

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Read `manifest.json`.

        Raises:
            CacheError: When it is missing, damaged or of another format.
        """
        path = folder / FILE
        if not path.exists():
            raise CacheError(f"{str(folder)!r} is no latent cache: it has no {FILE}")
        values = read_json(path)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CacheError(f"{str(path)!r} is no manifest of a latent cache")
        version = values.pop("version", None)
        if version != VERSION:
            raise CacheError(
                f"{str(path)!r} has format version {version}; this release reads {VERSION}"
            )
        if isinstance(values.get("preprocessing"), dict):
            # Before there was a choice, embedded color profiles were left alone.
            values["preprocessing"].setdefault("color", "keep")
            values["preprocessing"].setdefault("upright", True)
        known = {f.name for f in dataclasses.fields(Manifest)}
        if missing := {"first_stage", "preprocessing", "store"} - set(values):
            raise CacheError(f"{str(path)!r} lacks {', '.join(sorted(missing))}")
        return Manifest(**{key: value for key, value in values.items() if key in known})


def describe_first_stage(first_stage: "FirstStage", revision: str | None) -> dict[str, Any]:
    """The manifest's `first_stage` entry.

    Args:
        first_stage: The first stage; its name is the folder or hub id it was loaded from.
        revision: The hub revision.
    """
    autoencoder = first_stage.model
    config: Mapping[str, Any] = getattr(autoencoder, "config", {})
    weights = fingerprint_weights(autoencoder)
    return {
        "name": first_stage.name,
        "revision": revision,
        "class": type(autoencoder).__name__,
        "encoder_sha256": weights.encoder,
        "decoder_sha256": weights.decoder,
        "config": latent_config(config),
        "latent_channels": first_stage.latent_channels,
        "downsample_factor": first_stage.downsample_factor,
        **pipeline_statistics(first_stage),
        "encoder_tensors": weights.tensors,
        **describe_codebook(autoencoder),
    }


def pipeline_statistics(first_stage: "FirstStage") -> dict[str, Any]:
    """What pipelines normalize a first stage's latents by.

    Returns:
        `scaling_factor` and `shift_factor`, `latents_mean` and `latents_std` (a list each, or
        `None`), and whether there is a `batch_norm` over patches of latents, as in Flux 2.
    """
    model = first_stage.model
    config: Mapping[str, Any] = getattr(model, "config", {})
    lists = {name: config.get(name) for name in ("latents_mean", "latents_std")}
    scaling, shift = first_stage.scaling_and_shift
    return {
        "scaling_factor": scaling,
        "shift_factor": shift,
        **{name: None if v is None else [float(x) for x in v] for name, v in lists.items()},
        "batch_norm": getattr(getattr(model, "bn", None), "running_mean", None) is not None,
    }


def describe_codebook(autoencoder: nn.Module) -> dict[str, Any]:
    """Number of codes, and SHA-256 of the codebook's shape and float32 bytes; empty without one."""
    weight = getattr(getattr(getattr(autoencoder, "quantize", None), "embedding", None), "weight",
                     None)  # fmt: skip
    if not isinstance(weight, torch.Tensor):
        return {}
    table = weight.detach().float().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(table.shape)} ".encode())
    digest.update(table.flatten().view(torch.uint8).numpy().tobytes())
    return {"codes": len(table), "codebook_sha256": digest.hexdigest()}


def describe_preprocessing(
    reading: Reading, resolution: int, resize: int | None, buckets: list[list[int]] | None
) -> dict[str, Any]:
    """The manifest's `preprocessing` entry.

    Args:
        reading: How files are read.
        resolution: Side of the centre crop.
        resize: Shorter side after resizing; `None` keeps sizes.
        buckets: Shapes (height, width) instead of the square, or `None`.
    """
    return {
        **reading.describe(),
        "pixel_range": [-1, 1],
        "resolution": resolution,
        "resize": resize,
        "buckets": buckets,
        "crop": "center",
        "resampling": "bicubic, antialiased",
    }


def mismatches(cache: Manifest, launch: Manifest) -> list[str]:
    """Everything a launch would encode differently from what is in a cache.

    Args:
        cache: What the cache was made with.
        launch: What the launch would use.

    Returns:
        One phrase per field with both values; empty when nothing differs.
    """
    found: list[str] = []
    one, other = cache.first_stage, launch.first_stage
    if one["encoder_sha256"] != other["encoder_sha256"]:
        found.append(_weights_phrase(one, other))
    if cache.holds_tokens and one.get("codebook_sha256") != other.get("codebook_sha256"):
        found.append(_codebook_phrase(one, other))
    pairs = [
        ("first_stage class", one["class"], other["class"]),
        *_entries("first_stage config", one["config"], other["config"]),
        *_entries("preprocessing", cache.preprocessing, launch.preprocessing),
        *_entries("store", cache.store, launch.store),
    ]
    found += [f"{name}: cache {a!r}, now {b!r}" for name, a, b in pairs if a != b]
    return found


def check_weights(cache: Manifest, autoencoder: nn.Module, folder: Path) -> None:
    """Refuse an autoencoder whose encoder did not make this cache.

    Raises:
        CacheError: Showing both fingerprints and the tensors that differ.
    """
    weights = fingerprint_weights(autoencoder)
    if weights.encoder != cache.first_stage["encoder_sha256"]:
        now = {"encoder_sha256": weights.encoder, "encoder_tensors": weights.tensors}
        raise CacheError(
            f"{str(folder)!r} was encoded by another first stage: "
            f"{_weights_phrase(cache.first_stage, now)}"
        )
    now = describe_codebook(autoencoder)
    there = cache.first_stage
    if cache.holds_tokens and there["codebook_sha256"] != now.get("codebook_sha256"):
        raise CacheError(
            f"the tokens in {str(folder)!r} number other codes: {_codebook_phrase(there, now)}"
        )


def _entries(
    name: str, one: Mapping[str, Any], other: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    return [(f"{name}.{k}", one.get(k), other.get(k)) for k in sorted({*one, *other})]


def _codebook_phrase(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    there, here = (str(x.get("codebook_sha256"))[:16] for x in (one, other))
    counts = f"{one.get('codes')} and {other.get('codes')} codes"
    return f"codebook: cache {there}, now {here} ({counts})"


def _weights_phrase(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    there, here = one["encoder_tensors"], other["encoder_tensors"]
    names = sorted(n for n in {*there, *here} if there.get(n) != here.get(n))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"encoder weights: cache {one['encoder_sha256'][:16]}, now {other['encoder_sha256'][:16]} "
        f"({len(names)} of {len({*there, *here})} tensors differ: {shown})"
    )
