"""VGG16's feature maps and the linear heads of LPIPS, with pretrained weights.

The weights come from a file or a hub repository; no other package is needed. The network is frozen
and has nothing that depends on a mode, such as dropout.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from first_stage.errors import ConfigError, first_line

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Numbers of the convolutions of each stage in torchvision's `vgg16().features`."""
_WIDTHS = (64, 128, 256, 512, 512)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG16Features(nn.Module):
    """The convolutional part of VGG16 (Simonyan & Zisserman 2015, configuration D).

    Names of the weights are those of torchvision's `vgg16`: `features.0.weight` and so on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        previous = 3
        for numbers, width in zip(STAGES, _WIDTHS, strict=True):
            for number in numbers:
                self.features[str(number)] = nn.Conv2d(previous, width, 3, padding=1)
                previous = width
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, images: Tensor, depth: int = len(STAGES)) -> list[Tensor]:
        """Feature maps relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, float32.

        Args:
            images: `(B, 3, H, W)` RGB in [-1, 1]; at least 16 pixels high and wide.
            depth: How many of the maps are wanted.
        """
        hidden = ((images + 1.0) / 2.0 - self.mean) / self.std
        maps = []
        for stage, numbers in enumerate(STAGES[:depth]):
            if stage > 0:
                hidden = F.max_pool2d(hidden, 2)
            for number in numbers:
                hidden = F.relu(self.features[str(number)](hidden))
            maps.append(hidden.float())
        return maps


class LPIPSHeads(nn.Module):
    """The linear heads that turn feature differences into LPIPS.

    Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric",
    equation 1: unit vectors at each place, squared differences weighted per channel, mean over
    places, sum over layers. Dropout, which the original trains its heads with, plays no part.
    """

    def __init__(self) -> None:
        super().__init__()
        for layer, width in enumerate(_WIDTHS):
            self.register_buffer(f"lin{layer}", torch.zeros(1, width, 1, 1))

    def forward(self, fakes: list[Tensor], reals: list[Tensor]) -> Tensor:
        """LPIPS of a batch, `(B,)`, from the five feature maps of each side."""
        total = torch.zeros(len(fakes[0]), device=fakes[0].device)
        for layer, (fake, real) in enumerate(zip(fakes, reals, strict=True)):
            difference = (_unit(fake) - _unit(real)).square()
            total = total + (difference * self.get_buffer(f"lin{layer}")).sum(1).mean((1, 2))
        return total


def _unit(features: Tensor) -> Tensor:
    # The original divides by the norm plus 1e-10. Inside the root the 1e-20 gives the same number,
    # and a gradient where all channels are 0.
    return features / (features.square().sum(1, keepdim=True) + 1e-20).sqrt()


def load_vgg(weights: str) -> VGG16Features:
    """VGG16 with the weights of `loss.pretrained.weights`, frozen.

    Raises:
        ConfigError: When the file cannot be had or lacks a tensor.
    """
    network, field = VGG16Features(), "loss.pretrained.weights"
    _fill(network, _tensors(weights, field), weights, field)
    return network


def load_lpips_heads(heads: str) -> LPIPSHeads:
    """The heads of LPIPS from `loss.pretrained.heads`, frozen.

    Raises:
        ConfigError: When the file cannot be had or lacks a tensor.
    """
    module, field = LPIPSHeads(), "loss.pretrained.heads"
    found = _tensors(heads, field)
    names = {f"lin{n}.model.1.weight": f"lin{n}" for n in range(len(_WIDTHS))}
    renamed = {names.get(name, name): tensor for name, tensor in found.items()}
    _fill(module, renamed, heads, field)
    return module


def _tensors(name: str, field: str) -> Mapping[str, Tensor]:
    """The tensors of a file, or of the safetensors file of a hub repository."""
    path = Path(name)
    if not path.is_file():
        path = _downloaded(name, field)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{field} {name!r} holds more than tensors, or is damaged: give a .safetensors file"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise ConfigError(f"{field} {name!r} cannot be read: {first_line(error)}") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{field} {name!r} holds no tensors by name: give a .safetensors file")
    return loaded


def _downloaded(name: str, field: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(f"{field} {name!r} does not exist (and is no hub id like owner/name)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "model.safetensors"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"{field} {name!r} cannot be downloaded: {first_line(error)}. Give a local file"
        ) from error


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], name: str, field: str) -> None:
    own = module.state_dict()
    for key, tensor in own.items():
        found = tensors.get(key)
        if found is None:
            raise ConfigError(f"{field} {name!r} lacks the tensor {key!r}")
        if found.shape != tensor.shape:
            raise ConfigError(
                f"{field} {name!r}: {key!r} has shape {list(found.shape)}, not {list(tensor.shape)}"
            )
    module.load_state_dict({key: tensors[key].float() for key in own})
