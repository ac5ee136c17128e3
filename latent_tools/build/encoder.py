"""The passes through a first stage's encoder: images -> what the cache stores, in float32."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from first_stage.config.types import Precision
from first_stage.distributed.memory import is_out_of_memory
from first_stage.errors import first_line
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage, lay_out
from latent_tools.format.files import CacheError

_PROBE_SIDE = 128  # a multiple of every published image autoencoder's downsample factor
_TOO_LARGE = "CUDNN_STATUS_NOT_SUPPORTED"  # what cuDNN says of some batches that are too large
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context that computes in a precision on a device."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def allow_compiling(shapes: int, batch_size: int) -> None:
    """Let dynamo compile as often as a launch can need.

    By itself it compiles 8 shapes and runs all others uncompiled, with a warning.

    Args:
        shapes: Of the images.
        batch_size: Images per pass at first; halved where memory runs out, so that each shape may
            come in as many sizes as this has halves.
    """
    limit = 8 + shapes * batch_size.bit_length()
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)


class LatentEncoder:
    """A first stage's encoder as a launch uses it: in a precision, compiled if asked for.

    Args:
        first_stage: In float32; it is put into eval mode, the channels-last layout, and on the
            device.
        device: Where it runs.
        precision: Autocast type. With `fp16` a first stage whose config says `force_upcast` runs
            in float32, as in diffusers' pipelines.
        compile: Use `torch.compile`, once per shape.
        tokens: Give the numbers of the codes, for a first stage that has some.

    Raises:
        CacheError: When images cannot be read into its channels, or it does not encode them.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        device: torch.device,
        precision: Precision = "no",
        compile: bool = False,
        tokens: bool = False,
    ):
        config: Any = getattr(first_stage.model, "config", {})
        self.is_upcast = precision == "fp16" and bool(config.get("force_upcast", False))
        self.precision: Precision = "no" if self.is_upcast else precision
        self.device, self.first_stage = device, first_stage
        first_stage.to(device).eval().requires_grad_(False)
        # Convolutions are fastest on channels-last weights and images, on CPUs and GPUs alike.
        lay_out(first_stage)
        self.has_posterior = self._probe()
        self._encode = torch.compile(self._moments, dynamic=False) if compile else self._moments
        self._codes = first_stage.bottleneck if tokens else None
        if tokens and not isinstance(self._codes, Discrete):
            raise CacheError(
                f"representation is 'tokens', but the first stage {first_stage.name!r} "
                f"({type(first_stage.model).__name__}) has no codebook: use mean or moments"
            )

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Whether there is a posterior; an encoder that fails does so before the long work."""
        stage = self.first_stage
        image = torch.zeros(1, stage.in_channels, _PROBE_SIDE, _PROBE_SIDE, device=self.device)
        try:
            return stage.encode(image).logvar is not None
        except Exception as error:
            raise CacheError(
                f"the first stage {stage.name!r} ({type(stage.model).__name__}) does not encode "
                f"images: {first_line(error)}"
            ) from error

    def _moments(self, images: Tensor) -> Tensor:
        return self.first_stage.encode(images).moments

    def __call__(self, images: Tensor) -> Tensor:
        """Encode.

        Args:
            images: `(B, C_in, H, W)` in [-1, 1] on the encoder's device.

        Returns:
            `(B, 2C, h, w)` float32, mean and then log-variance, where there is a posterior;
            otherwise the latents `(B, C, h, w)`; tokens `(B, 1, h, w)` where they are asked for,
            exact up to 2^24 of them.
        """
        return self._run(self._encode, images, self.precision)

    def in_float32(self, images: Tensor) -> Tensor:
        """Encode without autocast, for samples that were not finite with it.

        A few samples only: nothing is compiled for their number and precision.
        """
        return self._run(self._moments, images, "no")

    @torch.inference_mode()
    def _run(
        self, encode: Callable[[Tensor], Tensor], images: Tensor, precision: Precision
    ) -> Tensor:
        with autocast(self.device, precision):
            latents = encode(images.contiguous(memory_format=torch.channels_last)).float()
        if isinstance(self._codes, Discrete):
            return self._codes.tokens(latents)[:, None].float()
        return latents


class BatchSplitter:
    """Halves the batch when the device runs out of memory, and remembers the size that fits.

    Args:
        encoder: Encodes `(B, ...)` to `(B, ...)`.
        batch_size: Samples per forward pass to begin with.
        is_padded: Whether a smaller batch is filled up, so that a compiled encoder sees one shape.
    """

    def __init__(self, encoder: LatentEncoder, batch_size: int, is_padded: bool = False):
        self.encoder, self.batch_size, self.is_padded = encoder, batch_size, is_padded

    def __call__(self, images: Tensor) -> Tensor:
        """Encode a batch of any size in passes that fit.

        Raises:
            CacheError: When a single sample does not fit.
        """
        while True:
            try:
                return torch.cat([self._padded(p) for p in images.split(self.batch_size)])
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) or _TOO_LARGE in str(error)):
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
