"""What a decoder's convolutions see beyond the border: zeros, or the image reflected.

Zeros tell a network where the border is, and make the outermost pixels worse (VIVAT, 2025, counts
the artifacts at corners and borders among five). Reflection is a property of the convolutions, for
which no class of diffusers has a field: an entry of the config carries it, which stock diffusers
keeps but does not act on. The encoder stays as it is, so that latents do.
"""

from typing import Any

from torch import nn

from first_stage.config.schema import Padding
from first_stage.errors import UserError

FIELD = "decoder_padding"
"""Entry of the config; absent where a decoder pads with zeros, as diffusers does."""


def padding_of(model: Any) -> Padding:
    """What the config of a model says.

    Raises:
        UserError: When it says something else.
    """
    found = getattr(getattr(model, "config", None), FIELD, "zeros")
    if found not in ("zeros", "reflect"):
        raise UserError(f"config.json has {FIELD} {found!r}: it can be zeros or reflect")
    return "reflect" if found == "reflect" else "zeros"


def set_padding(model: Any, padding: Padding) -> None:
    """Let a model's decoder pad in this way, in place, and its config say so.

    Args:
        model: A diffusers autoencoder.
        padding: The way; what is 1x1 pads nothing in either.

    Raises:
        UserError: When no convolution of it could reflect.
    """
    found = _padded(model)
    if padding == "reflect" and not found:
        raise UserError(
            f"{FIELD} is reflect, but {type(model).__name__} has no decoder with convolutions that "
            "pad: leave it out"
        )
    for conv in found:
        conv.padding_mode = padding
    if padding == "reflect":
        model.register_to_config(**{FIELD: padding})
    elif FIELD in model.config:
        from diffusers.configuration_utils import FrozenDict

        kept = {key: value for key, value in model.config.items() if key != FIELD}
        model._internal_dict = FrozenDict(kept)


def least_latents(model: Any) -> int:
    """Latents along a side that a decoder can reflect: each from one that lies further inside."""
    if padding_of(model) == "zeros":
        return 1
    reach = (max(conv._reversed_padding_repeated_twice) for conv in _padded(model))
    return 1 + max(reach, default=0)


def stock_lines(padding: Padding) -> list[str]:
    """Lines of Python after which `vae`, loaded by stock diffusers, decodes as it was trained.

    Args:
        padding: What it was trained with.
    """
    if padding == "zeros":
        return []
    return [
        "for m in vae.decoder.modules():  # diffusers pads with zeros, this decoder by reflection",
        "    if isinstance(m, torch.nn.Conv2d) and m.padding != (0, 0): m.padding_mode = 'reflect'",
    ]


def _padded(model: Any) -> list[nn.Conv2d]:
    """The convolutions of a decoder that see beyond its border."""
    decoder = getattr(model, "decoder", None)
    modules = decoder.modules() if isinstance(decoder, nn.Module) else ()
    return [m for m in modules if isinstance(m, nn.Conv2d) and m.padding != (0, 0)]
