"""What a codebook costs: its share of a training step, and its memory with the number of tokens.

    python -m benchmarks quantize --config configs/demo_vq.yaml

The step is that of the recipe with the critic at work; the quantizer's part is its forward and
backward pass on the tokens of that step, and what follows the update (usage, restarts).
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.timing import spread, text
from first_stage.config import parse_config
from first_stage.data import Batch
from first_stage.distributed.processes import Processes
from first_stage.models.codebooks import Codebook
from first_stage.training.step import Trainer

_CODES = (1024, 16384)
_TOKENS = (1024, 4096, 16384)
_DIMENSIONS = 8


def benchmark_quantize(recipe: list[str], repeats: int) -> dict[str, Any]:
    """Time steps and their quantizers at 1,024 and 16,384 codes; count what autograd keeps.

    Args:
        recipe: Arguments of a training with `model.family` vq.
        repeats: Turns.

    Returns:
        By number of codes: seconds of CPU a step and a quantizer took and the share, each with its
        spread; by number of tokens: MiB that the quantizer keeps for its backward pass.
    """
    found: dict[str, Any] = {"share": {}, "kept_mib": {}}
    for codes in _CODES:
        config = parse_config([*recipe, "--data.path", "photos", "--model.vq.codes", str(codes)])
        trainer = Trainer(config, Accelerator(mixed_precision="no"), Processes())
        batch = _batch(config.train.batch_size, config.data.resolution, config.model.in_channels)
        begin = max(config.critic.start_step, config.loss.adversarial.start_step) + 1
        bottleneck, shape = trainer.first_stage.network.bottleneck, trainer.latent_shape(batch)

        def step(trainer: Trainer = trainer, batch: Batch = batch, begin: int = begin) -> None:
            trainer.training_step(begin, [batch])

        size = (config.train.batch_size, *shape)

        def quantize(bottleneck: Any = bottleneck, size: tuple[int, ...] = size) -> None:
            code = bottleneck(torch.randn(size, requires_grad=True))
            penalties = torch.stack([p.mean() for p in code.penalties.values()]).sum()
            (code.latents.sum() + penalties).backward()
            bottleneck.finish_step(1, Processes(), 0)

        step(), quantize()  # the first ones make optimizer states and threads
        whole = [_seconds(step) for _ in range(repeats)]
        part = [_seconds(quantize) for _ in range(repeats)]
        shares = [p / w for p, w in zip(part, whole, strict=True)]
        found["share"][str(codes)] = {
            "step": spread(whole), "quantizer": spread(part), "share": spread(shares),
        }  # fmt: skip
        print(
            f"{codes:>6} codes   step {text(whole, '.3f')} s, quantizer {text(part, '.4f')} s of "
            f"CPU, share {text(shares, '.1%')}"
        )
        kept = {str(tokens): _kept(codes, tokens) / 2**20 for tokens in _TOKENS}
        found["kept_mib"][str(codes)] = kept
        stock = {tokens: tokens * codes * 4 / 2**20 for tokens in _TOKENS}
        print("               " + ", ".join(
            f"{int(n):,} tokens keep {mib:.2f} MiB (N x K: {stock[int(n)]:,.0f})"
            for n, mib in kept.items()))  # fmt: skip
    return found


def _batch(count: int, side: int, channels: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, side, side, channels), dtype=torch.uint8, generator=draw)
    return Batch(pixels, list(range(count)), [""] * count)


def _seconds(act: Callable[[], None]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def _kept(codes: int, tokens: int) -> int:
    """Bytes that autograd keeps of a codebook's forward pass beside the codebook itself."""
    book = Codebook(codes, _DIMENSIONS)
    own, seen = {p.data_ptr() for p in book.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    latents = torch.randn(1, _DIMENSIONS, tokens, 1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        book(latents)
    return sum(seen.values())
