"""Any diffusers image autoencoder as one function: images -> what the cache stores, in float32."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from latent_tools.build.options import Precision
from latent_tools.format.files import CacheError

_PROBE_SIDE = 128  # a multiple of every published image autoencoder's downsample factor
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context that computes in a precision on a device."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


class Encoder:
    """The encoder side of a first stage.

    Args:
        autoencoder: A diffusers autoencoder with `encode`: one with a posterior (`AutoencoderKL`)
            or without (`AutoencoderTiny`, `VQModel`, `AutoencoderDC`).
        name: Its folder or hub id, for messages.
        device: Where it runs, in the channels-last layout.
        precision: Autocast type. With `fp16` a first stage whose config says `force_upcast` runs
            in float32, as in diffusers' pipelines.
        compile: Use `torch.compile`, once per shape.

    Raises:
        CacheError: When it does not encode images.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        name: str,
        device: torch.device,
        precision: Precision = "no",
        compile: bool = False,
    ):
        config: Any = getattr(autoencoder, "config", {})
        self.is_upcast = precision == "fp16" and bool(config.get("force_upcast", False))
        self.precision: Precision = "no" if self.is_upcast else precision
        self.device = device
        self.in_channels = int(config.get("in_channels", 3))
        self._autoencoder = autoencoder.to(device).eval().requires_grad_(False)
        # Convolutions are fastest on channels-last weights and images, on CPUs and GPUs alike.
        self._autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._encode = self._parameters
        self._probe(name)
        if compile:
            self._encode = torch.compile(self._parameters, dynamic=False)

    def _probe(self, name: str) -> None:
        image = torch.zeros(1, self.in_channels, _PROBE_SIDE, _PROBE_SIDE, device=self.device)
        try:
            with torch.inference_mode():
                output = self._autoencoder.encode(image, return_dict=False)[0]  # type: ignore[operator]
                self.has_posterior = hasattr(output, "logvar")
                parameters = self._parameters(image)
        except Exception as error:
            kind = type(self._autoencoder).__name__
            raise CacheError(
                f"the first stage {name!r} ({kind}) does not encode images: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from error
        if parameters.ndim != 4:
            raise CacheError(f"the first stage {name!r} gives latents of shape {parameters.shape}")
        self.latent_channels = parameters.shape[1] // (2 if self.has_posterior else 1)
        self.factor = _PROBE_SIDE // parameters.shape[-1]

    def _parameters(self, images: Tensor) -> Tensor:
        output = self._autoencoder.encode(images, return_dict=False)[0]  # type: ignore[operator]
        if hasattr(output, "logvar"):
            return torch.cat([output.mean, output.logvar], dim=1)
        return output

    def __call__(self, images: Tensor) -> Tensor:
        """Encode.

        Args:
            images: `(B, C_in, H, W)` in [-1, 1] on the encoder's device.

        Returns:
            `(B, 2C, h, w)` float32, mean and then log-variance, where there is a posterior;
            otherwise the latents `(B, C, h, w)`.
        """
        return self._run(images, self.precision)

    def in_float32(self, images: Tensor) -> Tensor:
        """Encode without autocast, for samples that were not finite with it."""
        return self._run(images, "no")

    @torch.inference_mode()
    def _run(self, images: Tensor, precision: Precision) -> Tensor:
        with autocast(self.device, precision):
            return self._encode(images.contiguous(memory_format=torch.channels_last)).float()


class BatchSplitter:
    """Halves the batch when the device runs out of memory, and remembers the size that fits.

    Args:
        encoder: Encodes `(B, ...)` to `(B, ...)`.
        batch_size: Samples per forward pass to begin with.
        is_padded: Whether a smaller batch is filled up, so that a compiled encoder sees one shape.
    """

    def __init__(self, encoder: Encoder, batch_size: int, is_padded: bool = False):
        self.encoder, self.batch_size, self.is_padded = encoder, batch_size, is_padded

    def __call__(self, images: Tensor) -> Tensor:
        """Encode a batch of any size in passes that fit.

        Raises:
            CacheError: When a single sample does not fit.
        """
        while True:
            try:
                return torch.cat([self._padded(p) for p in images.split(self.batch_size)])
            except RuntimeError as error:
                from accelerate.utils.memory import should_reduce_batch_size

                if not should_reduce_batch_size(error):
                    raise
                if self.batch_size == 1:
                    height, width = images.shape[-2:]
                    raise CacheError(
                        f"one image of {height}x{width} does not fit into the memory of "
                        f"{images.device}: use a smaller data.resolution, or --precision bf16"
                    ) from error
            # Outside of the handler: the exception holds on to the failed pass's tensors.
            self.batch_size = max(1, self.batch_size // 2)
            if images.device.type == "cuda":
                torch.cuda.empty_cache()

    def _padded(self, images: Tensor) -> Tensor:
        missing = self.batch_size - len(images)
        if not self.is_padded or missing <= 0:
            return self.encoder(images)
        filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        return self.encoder(filled)[: len(images)]
