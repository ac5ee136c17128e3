"""Names of weights in latent diffusion's files, and the same ones in diffusers.

Latent diffusion (Rombach et al. 2022, `ldm/modules/diffusionmodules/model.py`) counts the decoder's
levels from the finest, diffusers from the coarsest, and keeps attention as 1x1 convolutions. Both
ways are exact: nothing is computed, a matrix only gets or loses two axes of length 1.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BACK = {new: old for old, new in _ATTENTION.items()}
_MATRIX = re.compile(r"attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight$")
_LDM_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.")
_LEVEL = re.compile(
    r"(encoder\.down_blocks|decoder\.up_blocks)\.(\d+)\."
    r"(resnets|attentions|downsamplers\.0|upsamplers\.0)\."
)
_PARTS = {
    "block": "resnets",
    "attn": "attentions",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
}
_PARTS_BACK = {new: old for old, new in _PARTS.items()}


def in_diffusers_names(names: Iterable[str]) -> bool:
    """Whether an autoencoder's weights are named as diffusers names them."""
    return any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names)


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under diffusers' names.

    Args:
        weights: Of an autoencoder, without a prefix, by latent diffusion's names; diffusers' own,
            the first ones of attention among them, stay.

    Returns:
        The same tensors; those of attention `(C, C)` instead of `(C, C, 1, 1)`.
    """
    levels = 1 + max((int(m[2]) for n in weights if (m := _LDM_LEVEL.match(n))), default=0)
    renamed = {}
    for name, value in weights.items():
        new = _to_diffusers(name, levels)
        renamed[new] = _matrix(value) if _MATRIX.search(new) else value
    return renamed


def to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under latent diffusion's names: the inverse of `to_diffusers`.

    Args:
        weights: A state dict of `AutoencoderKL`, `VQModel` or `AutoencoderKLFlux2`.
    """
    levels = 1 + max((int(m[2]) for n in weights if (m := _LEVEL.match(n))), default=0)
    return {
        _to_ldm(name, levels): value[..., None, None] if _MATRIX.search(name) else value
        for name, value in weights.items()
    }


def _matrix(value: Tensor) -> Tensor:
    return value[:, :, 0, 0] if value.ndim == 4 and value.shape[2:] == (1, 1) else value


def _to_diffusers(name: str, levels: int) -> str:
    for half in ("encoder.", "decoder."):  # Flux 2's original file has them in its halves
        for conv in ("quant_conv.", "post_quant_conv."):
            if name.startswith(half + conv):
                return name.removeprefix(half)
    if match := _LDM_LEVEL.match(name):
        half, level, part = match[1], int(match[2]), _PARTS[match[3]]
        level = levels - 1 - level if half == "decoder.up" else level
        name = f"{half}_blocks.{level}.{part}.{name[match.end() :]}"
    name = re.sub(r"\.mid\.attn_1\.", ".mid_block.attentions.0.", name)
    name = re.sub(r"\.mid\.block_(\d+)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = name.replace(".nin_shortcut.", ".conv_shortcut.")
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    known = _ATTENTION | _OLD_ATTENTION
    return re.sub(
        r"(attentions\.\d+)\.(\w+)\.(weight|bias)$",
        lambda m: f"{m[1]}.{known.get(m[2], m[2])}.{m[3]}",
        name,
    )


def _to_ldm(name: str, levels: int) -> str:
    name = re.sub(
        r"(attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0|group_norm)\.",
        lambda m: f"{m[1]}.{_BACK[m[2]]}.",
        name,
    )
    if match := _LEVEL.match(name):
        half, level, part = match[1], int(match[2]), _PARTS_BACK[match[3]]
        level = levels - 1 - level if half == "decoder.up_blocks" else level
        name = f"{half.removesuffix('_blocks')}.{level}.{part}.{name[match.end() :]}"
    name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.")
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = name.replace(".conv_shortcut.", ".nin_shortcut.")
    return re.sub(r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out.", name)


# -- TAESD ---------------------------------------------------------------------------------------

_TINY = re.compile(r"(?:taesd_)?(encoder|decoder)\.(\d+)\.(.+)$")


def is_tiny(names: Iterable[str]) -> bool:
    """Whether these are the numbered layers of TAESD, `taesd_decoder.1.weight` and so on."""
    return any(_TINY.match(name) for name in names)


def tiny_to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TAESD's numbered layers under diffusers' names; its decoder begins with a clamp there."""
    renamed = {}
    for name, value in weights.items():
        if (match := _TINY.match(name)) is None:
            continue  # vae_scale and vae_shift, which are 1 and 0
        number = int(match[2]) - (match[1] == "decoder")
        renamed[f"{match[1]}.layers.{number}.{match[3]}"] = value
    return renamed


def tiny_to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: `taesd_encoder.` and `taesd_decoder.`, as programs look for them."""
    renamed = {}
    for name, value in weights.items():
        half, _, number, rest = name.split(".", 3)
        renamed[f"taesd_{half}.{int(number) + (half == 'decoder')}.{rest}"] = value
    return renamed
