"""From decoded chunks to encoded ones: the passes through the encoder and what they give.

A chunk's pass is started before the one before it is read back, so that the device has work while
results are checked. Each pass sends its results to page-locked memory itself: reading one back then
waits for its own copy, not for the pass that was started behind it.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from first_stage.data import images_from_pixels
from first_stage.seeding import Purpose, generator
from latent_tools.build.encoder import BatchSplitter
from latent_tools.build.images import DecodedChunk
from latent_tools.build.unit import EncodedChunk
from latent_tools.format.manifest import Representation, tensor_name
from latent_tools.format.shards import DTYPES, Dtype, TokenDtype

_CHECKED = 2
"""Samples per unit that are encoded in float32 too, where the precision is less."""


def sample_key(name: str) -> int:
    """A sample's number in random draws: 64 bits of its id's hash.

    Its draws then stay the same when the data set grows or only a part of it is read.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass
class Pass:
    """A chunk on its way through the encoder.

    Attributes:
        chunk: The decoded chunk.
        images: `(B, C_in, H, W)` in [-1, 1] on the device; `None` when nothing could be decoded.
        outputs: Of the images and, when asked for, of the flipped ones: `(B, K, h, w)` each.
    """

    chunk: DecodedChunk
    images: Tensor | None
    outputs: list["Readback"]


class Readback:
    """A result on its way from the device.

    Args:
        output: On any device.
    """

    def __init__(self, output: Tensor):
        self._event: torch.cuda.Event | None = None
        self._value = output
        if output.device.type == "cuda":
            self._value = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
            self._value.copy_(output, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(output.device))

    def get(self) -> Tensor:
        """The result on the CPU, once its copy has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.cpu()


class ChunkEncoder:
    """Encodes chunks, in order.

    Args:
        splitter: The encoder, in batches that fit.
        representation: `moments`, `mean`, `sample` or `tokens`.
        dtype: What latents will be stored as; a sample outside of its range fails.
        flip: Encode the flipped pixels too.
        seed: Of the draws that `sample` stores.
    """

    def __init__(
        self,
        splitter: BatchSplitter,
        *,
        representation: Representation,
        dtype: Dtype | TokenDtype,
        flip: bool,
        seed: int,
    ):
        self.splitter, self.encoder = splitter, splitter.encoder
        self.representation, self.dtype, self.flip, self.seed = representation, dtype, flip, seed
        self._checked: set[int] = set()

    def start(self, chunk: DecodedChunk) -> Pass:
        """Send a chunk through the encoder, without waiting for the device."""
        if chunk.pixels is None:
            return Pass(chunk, None, [])
        pixels = chunk.pixels.to(self.encoder.device, non_blocking=True)
        images = images_from_pixels(pixels)
        outputs = [Readback(self.splitter(images))]
        if self.flip:
            outputs.append(Readback(self.splitter(images.flip(3))))
        return Pass(chunk, images, outputs)

    def finish(self, started: Pass) -> EncodedChunk:
        """Read a chunk's latents back."""
        chunk = started.chunk
        encoded = EncodedChunk(
            chunk.unit, chunk.shape, tensor_name(self.representation), [], [],
            list(chunk.failures), is_last=chunk.is_last,
            batch_size=self.splitter.batch_size,
        )  # fmt: skip
        if started.images is not None:
            self._read_back(started.images, started, encoded)
        return encoded

    def _read_back(self, images: Tensor, started: Pass, encoded: EncodedChunk) -> None:
        records = started.chunk.records
        ids = [record.id for record in records]
        latents = [
            self._represent(output.get(), ids, flipped)
            for flipped, output in enumerate(started.outputs)
        ]
        fine = self._can_be_stored(latents).tolist()
        keep: list[int] = []
        for row, record in enumerate(records):
            reason = None
            if not fine[row]:
                reason = self._mend(encoded, images, latents, row, record.id)
            if reason is None:
                keep.append(row)
                encoded.records.append(record)
            else:
                encoded.failures.append((record.id, reason))
        encoded.latents = [part if len(keep) == len(part) else part[keep] for part in latents]
        is_exact = self.encoder.precision == "no" or self.representation == "tokens"
        if keep and not is_exact and encoded.unit not in self._checked:
            self._checked.add(encoded.unit)
            chosen = keep[:_CHECKED]
            exact = self.encoder.in_float32(images[chosen]).cpu()
            encoded.exact = self._represent(exact, [ids[row] for row in chosen], 0)

    def _represent(self, output: Tensor, ids: list[str], flipped: int) -> Tensor:
        if self.representation == "moments" or not self.encoder.has_posterior:
            return output
        mean, logvar = output.chunk(2, dim=1)
        if self.representation == "mean":
            return mean.contiguous()
        noise = torch.empty_like(mean)
        for row, name in enumerate(ids):
            draw = generator(self.seed, Purpose.LATENT, 0, sample_key(name), flipped)
            noise[row] = torch.from_numpy(draw.standard_normal(mean.shape[1:], dtype="float32"))
        return mean + torch.exp(0.5 * logvar) * noise

    def _can_be_stored(self, latents: list[Tensor]) -> Tensor:
        """Which samples are finite, and are so in the type they are stored in: `(B,)`."""
        stored = torch.float32 if self.dtype.startswith("uint") else DTYPES[self.dtype]
        finite = [part.to(stored).isfinite().flatten(1).all(1) for part in latents]
        return torch.stack(finite).all(0)

    def _mend(
        self, encoded: EncodedChunk, images: Tensor, latents: list[Tensor], row: int, name: str
    ) -> str | None:
        """Encode a sample that is not finite again in float32; why it cannot be stored, if so."""
        is_finite = all(part[row].isfinite().all() for part in latents)
        if not is_finite and self.encoder.precision != "no":
            encoded.retried.append(name)
            for flipped, part in enumerate(latents):
                image = images[row : row + 1]
                output = self.encoder.in_float32(image.flip(3) if flipped else image).cpu()
                part[row] = self._represent(output, [name], flipped)[0]
        if not all(part[row].isfinite().all() for part in latents):
            return "the latents are not finite, not even in float32"
        return self._out_of_range(latents, row)

    def _out_of_range(self, latents: list[Tensor], row: int) -> str | None:
        if self._can_be_stored([part[row : row + 1] for part in latents]).all():
            return None
        largest = max(float(part[row].abs().max()) for part in latents)
        return f"the latents (up to {largest:.3g}) are outside the range of {self.dtype}"
