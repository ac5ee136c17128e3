"""From decoded portions to complete units: the passes through the encoder and what they give.

A portion's pass is started before the one before it is read back, so that the device has work while
results are copied and checked.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from first_stage.data import images_from_pixels
from first_stage.seeding import Purpose, generator
from latent_tools.build.encoder import BatchSplitter
from latent_tools.build.images import DecodedPortion
from latent_tools.format.manifest import Representation, tensor_name
from latent_tools.format.shards import DTYPES, Dtype, EncodedUnit, TokenDtype


def sample_key(name: str) -> int:
    """A sample's number in random draws: 64 bits of its id's hash.

    Its draws then stay the same when the data set grows or only a part of it is read.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass
class Pass:
    """A portion on its way through the encoder.

    Attributes:
        portion: The decoded portion.
        images: `(B, C_in, H, W)` in [-1, 1] on the device; `None` when nothing could be decoded.
        outputs: `(B, K, h, w)` on the device, of the images and, when asked for, of the flipped
            ones.
    """

    portion: DecodedPortion
    images: Tensor | None
    outputs: list[Tensor]


class UnitEncoder:
    """Encodes portions, in order, into units.

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
        self._open: dict[int, tuple[EncodedUnit, list[list[Tensor]]]] = {}

    def start(self, portion: DecodedPortion) -> Pass:
        """Send a portion through the encoder, without waiting for the device."""
        if portion.pixels is None:
            return Pass(portion, None, [])
        pixels = portion.pixels.to(self.encoder.device, non_blocking=True)
        images = images_from_pixels(pixels)
        outputs = [self.splitter(images)]
        if self.flip:
            outputs.append(self.splitter(images.flip(3)))
        return Pass(portion, images, outputs)

    def finish(self, started: Pass) -> tuple[int, EncodedUnit | None]:
        """Read a portion's latents back and add them to its unit.

        Returns:
            How many of the portion's samples failed, and the unit when this was its last portion.
        """
        portion = started.portion
        unit, parts = self._current(portion)
        failures = list(portion.failures)
        if started.images is not None:
            latents = [self._stored(output, portion, n) for n, output in enumerate(started.outputs)]
            fine = self._can_be_stored(latents).tolist()
            keep: list[int] = []
            for row, record in enumerate(portion.records):
                reason = None
                if not fine[row]:
                    reason = self._mend(unit, started.images, latents, row, record.id)
                if reason is None:
                    keep.append(row)
                    unit.records.append(record)
                else:
                    failures.append((record.id, reason))
            parts.append([part[keep] for part in latents])
        unit.failures += failures
        return len(failures), self._complete(unit, parts) if portion.is_last else None

    def _current(self, portion: DecodedPortion) -> tuple[EncodedUnit, list[list[Tensor]]]:
        if portion.unit not in self._open:
            name = tensor_name(self.representation)
            unit = EncodedUnit(portion.unit, portion.shape, name, None, None, [], [])
            self._open[portion.unit] = (unit, [])
        return self._open[portion.unit]

    def _complete(self, unit: EncodedUnit, parts: list[list[Tensor]]) -> EncodedUnit:
        if unit.records:
            unit.latents = torch.cat([part[0] for part in parts])
            if self.flip:
                unit.flipped = torch.cat([part[1] for part in parts])
        unit.batch_size = self.splitter.batch_size
        del self._open[unit.unit]
        return unit

    def _stored(self, output: Tensor, portion: DecodedPortion, flipped: int) -> Tensor:
        """The encoder's output on the CPU, as the representation has it."""
        return self._represent(output.cpu(), [r.id for r in portion.records], flipped)

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
        self, unit: EncodedUnit, images: Tensor, latents: list[Tensor], row: int, name: str
    ) -> str | None:
        """Encode a sample that is not finite again in float32; why it cannot be stored, if so."""
        is_finite = all(part[row].isfinite().all() for part in latents)
        if not is_finite and self.encoder.precision != "no":
            unit.retried.append(name)
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
