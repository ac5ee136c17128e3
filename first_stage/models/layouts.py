"""The layout of an autoencoder, read off the shapes of its weights: no config, no network.

What shapes cannot say is what pipelines do to latents: Stable Diffusion 1.x and XL have the same
shapes, and so have Stable Diffusion 3 and Flux.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

CLASSES = {
    "AutoencoderKL": "kl",
    "VQModel": "vq",
    "AutoencoderKLFlux2": "flux2",
    "AutoencoderTiny": "tiny",
}
"""Classes that a single file can hold, and their families."""
_GROUPS = 32
"""Of every group norm in the public ones; shapes do not say it."""
KNOWN_SCALES = {
    (4, True): "0.18215 in Stable Diffusion 1.x and 2.x, 0.13025 in Stable Diffusion XL",
    (16, False): "1.5305 with shift 0.0609 in Stable Diffusion 3, 0.3611 with 0.1159 in Flux",
}
"""By latent channels and whether there are 1x1 convolutions: what those shapes are used with."""
_WHOLE = (
    (r"^conditioner\.embedders\.1\.", "Stable Diffusion XL", (0.13025, None)),
    (r"^conditioner\.embedders\.0\.model\.", "Stable Diffusion XL refiner", (0.13025, None)),
    (r"^cond_stage_model\.", "Stable Diffusion 1.x or 2.x", (0.18215, None)),
    (r"^model\.diffusion_model\.joint_blocks\.", "Stable Diffusion 3", (1.5305, 0.0609)),
    (r"^model\.diffusion_model\.double_blocks\.", "Flux", (0.3611, 0.1159)),
)


def known_program(names: Iterable[str]) -> tuple[str, tuple[float, float | None]] | None:
    """Which model a whole checkpoint holds, by the names of its other weights.

    Returns:
        Its name, and the scaling and shift of its latents; `None` when it is not known.
    """
    names = list(names)
    for pattern, program, scale in _WHOLE:
        if any(re.match(pattern, name) for name in names):
            return program, scale
    return None


def config_of(shapes: Shapes, groups: int | None = None) -> dict[str, Any]:
    """The config of the diffusers class that has weights of these shapes.

    Args:
        shapes: By diffusers' names (see `ldm_keys`).
        groups: Groups of the norms; `None`: 32, as in all public ones.

    Returns:
        Arguments of the class, and its name as `_class_name`. `scaling_factor` is 1 and the shift
        0: shapes say neither.

    Raises:
        KeyError: Naming a weight that every autoencoder has and this one lacks.
        ValueError: When the widths cannot have these groups.
    """
    if "encoder.layers.0.weight" in shapes or "decoder.layers.0.weight" in shapes:
        return _tiny(shapes)
    widths = [
        shapes[f"encoder.down_blocks.{k}.resnets.0.conv1.weight"][0]
        for k in range(_count(shapes, r"encoder\.down_blocks\.(\d+)\."))
    ]
    ups = _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    decoder = [
        shapes[f"decoder.up_blocks.{k}.resnets.0.conv1.weight"][0] for k in reversed(range(ups))
    ]
    groups = groups or _GROUPS
    for name in ("encoder.down_blocks.0", "decoder.up_blocks.0"):
        if f"{name}.resnets.0.conv1.weight" not in shapes:
            raise KeyError(f"{name}.resnets.0.conv1.weight")
    if any(width % groups for width in {*widths, *decoder}):
        raise ValueError(
            f"its levels are {widths} wide, which {groups} groups, as in every public first stage, "
            "do not divide; the number of groups is in no shape: take its diffusers folder"
        )
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": tuple(widths),
        "down_block_types": _kinds(shapes, "encoder.down_blocks", len(widths), "Down", "Encoder"),
        "up_block_types": _kinds(shapes, "decoder.up_blocks", ups, "Up", "Decoder"),
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": groups,
        "mid_block_add_attention": any(".mid_block.attentions." in name for name in shapes),
        "sample_size": 512,
    }
    if "quantize.embedding.weight" in shapes:
        codes, dimensions = shapes["quantize.embedding.weight"]
        return config | {
            "_class_name": "VQModel", "num_vq_embeddings": codes, "vq_embed_dim": dimensions,
            "scaling_factor": 1.0,
        }  # fmt: skip
    config |= {
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }
    if "bn.running_mean" in shapes:
        narrower = None if decoder == widths else tuple(decoder)
        return config | {
            "_class_name": "AutoencoderKLFlux2",
            "sample_size": 1024,
            "decoder_block_out_channels": narrower,
        }
    return config | {"scaling_factor": 1.0, "shift_factor": 0.0, "force_upcast": True}


def scale_remark(config: Mapping[str, Any]) -> str | None:
    """What to say of a scaling factor that shapes leave open; `None` where nothing is open."""
    if config["_class_name"] not in ("AutoencoderKL", "VQModel"):
        return None
    known = KNOWN_SCALES.get((config["latent_channels"], config.get("use_quant_conv", False)))
    if config["_class_name"] == "VQModel":
        known = None
    used = f" ({known})" if known else ""
    return (
        f"its shapes do not say scaling_factor and shift_factor{used}; they are taken as 1 and 0: "
        "give them where a pipeline will decode"
    )


def _count(shapes: Iterable[str], pattern: str) -> int:
    """One more than the largest number that a pattern finds."""
    return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)


def _kinds(shapes: Shapes, at: str, count: int, way: str, half: str) -> tuple[str, ...]:
    attends = [any(name.startswith(f"{at}.{k}.attentions.") for name in shapes)
               for k in range(count)]  # fmt: skip
    return tuple(f"{'Attn' * attention}{way}{half}Block2D" for attention in attends)


def _tiny(shapes: Shapes) -> dict[str, Any]:
    """TAESD: between two changes of the resolution, blocks that are numbered like all layers."""
    for half in ("encoder", "decoder"):
        if f"{half}.layers.0.weight" not in shapes:
            raise KeyError(f"{half}.layers.0.weight")
    encoder, decoder = _levels(shapes, "encoder"), _levels(shapes, "decoder")
    width = shapes["encoder.layers.0.weight"][0]
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": shapes["encoder.layers.0.weight"][1],
        "out_channels": shapes[_last(shapes, "decoder")][0],
        "latent_channels": shapes["decoder.layers.0.weight"][1],
        "encoder_block_out_channels": (width,) * len(encoder),
        "decoder_block_out_channels": (shapes["decoder.layers.0.weight"][0],) * len(decoder),
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
    }


def _levels(shapes: Shapes, half: str) -> tuple[int, ...]:
    """Blocks on each level; the convolutions between levels have no bias."""
    counts = [0]
    for layer in range(1, _count(shapes, rf"{half}\.layers\.(\d+)\.")):
        if f"{half}.layers.{layer}.conv.0.weight" in shapes:
            counts[-1] += 1
        elif (
            f"{half}.layers.{layer}.weight" in shapes
            and f"{half}.layers.{layer}.bias" not in shapes
        ):
            counts.append(0)
    return tuple(counts)


def _last(shapes: Shapes, half: str) -> str:
    return f"{half}.layers.{_count(shapes, rf'{half}[.]layers[.]([0-9]+)[.]') - 1}.weight"
