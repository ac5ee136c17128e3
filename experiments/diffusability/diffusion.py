"""The small diffusion transformer: the parts of examples/digits, with one budget for all."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from examples.digits.train_diffusion import (
    Options,
    averaged,
    draws,
    make_transformer,
    rate_share,
)
from first_stage.config.types import PositiveFloat, PositiveInt
from first_stage.errors import UserError
from first_stage.models.first_stage import FirstStage
from first_stage.seeding import standard_normals
from latent_tools import BucketBatchSampler, LatentDataset

_AT_ONCE = 128


@dataclass(frozen=True)
class Budget:
    """What every first stage gets."""

    steps: PositiveInt = 1500
    """Updates of the transformer."""
    batch_size: PositiveInt = 64
    """Latents per update."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    layers: PositiveInt = 4
    """Transformer blocks."""
    heads: PositiveInt = 4
    """Attention heads, of 32 channels each."""
    patch_size: PositiveInt = 2
    """Latents per token along a side."""
    samples: PositiveInt = 1000
    """Images that are sampled, as many of each class."""
    inference_steps: PositiveInt = 25
    """Steps of the sampler."""


@dataclass(frozen=True)
class Diffusion:
    """A trained transformer.

    Attributes:
        transformer: With its averaged weights.
        scheduler: Of its noise levels.
        mean: Of the latents by channel, which it learned with mean 0 and variance 1.
        std: Their standard deviation.
        shape: Of a sample's latents, `(C, h, w)`.
    """

    transformer: DiTTransformer2DModel
    scheduler: DDIMScheduler
    mean: Tensor
    std: Tensor
    shape: tuple[int, int, int]


def train_diffusion(dataset: LatentDataset, labels: Tensor, budget: Budget, seed: int) -> Diffusion:
    """Train on a cache as examples/digits/train_diffusion.py does.

    Args:
        dataset: The cache, normalized by channel.
        labels: Class of every sample, `(N,)`; of an unlabelled data set all 0.
        budget: For how long.
        seed: Of weights, order and noise.
    """
    options = Options(
        steps=budget.steps, batch_size=budget.batch_size, learning_rate=budget.learning_rate,
        layers=budget.layers, heads=budget.heads, patch_size=budget.patch_size, seed=seed,
        warmup_steps=min(100, budget.steps // 5), label_dropout=0.0,
    )  # fmt: skip
    accelerator = Accelerator()
    torch.manual_seed(seed)
    transformer = make_transformer(options, dataset).to(accelerator.device)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        transformer.parameters(), options.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    ema = EMAModel(transformer.parameters(), decay=options.ema_decay, foreach=True)
    ema.to(accelerator.device)
    stream = itertools.islice(_batches(dataset, labels, budget.batch_size, seed), budget.steps)
    for step, (latents, classes) in enumerate(stream):
        noise, times, _ = draws(options, step, tuple(latents.shape[1:]), accelerator)
        latents = latents.to(accelerator.device)
        predicted = transformer(
            scheduler.add_noise(latents, noise, times),
            timestep=times,
            class_labels=classes.to(accelerator.device),
        ).sample
        loss = (predicted - scheduler.get_velocity(latents, noise, times)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = options.learning_rate * rate_share(step, options)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(transformer.parameters())
    with averaged(transformer, ema):
        state = {name: value.clone() for name, value in transformer.state_dict().items()}
    transformer.load_state_dict(state)
    mean, std = (torch.tensor(dataset.stats[name]).float() for name in ("mean", "std"))
    c, h, w = dataset[0]["latents"].shape
    return Diffusion(transformer, scheduler, mean, std, (c, h, w))


def _batches(
    dataset: LatentDataset, labels: Tensor, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents and classes, epoch after epoch."""
    sampler = BucketBatchSampler(dataset, size, seed=seed, rank=0, world=1, drop_last=True)
    if len(sampler) == 0:
        raise UserError(
            f"--budget.batch_size ({size}) is more than the {len(dataset)} images there are"
        )

    for epoch in itertools.count():
        sampler.set_epoch(epoch)  # anew: order and draws from the posterior
        for rows in sampler:
            items = dataset.items(rows, epoch)
            yield torch.stack([item["latents"] for item in items]), labels[rows]


def sample(
    diffusion: Diffusion, first_stage: FirstStage, classes: Tensor, budget: Budget, seed: int
) -> Tensor:
    """Images of these classes: `decoded` from `sample_latents`."""
    device = next(diffusion.transformer.parameters()).device
    latents = sample_latents(diffusion, classes, budget, seed)
    return decoded(first_stage.to(device), latents)


@torch.no_grad()
def decoded(first_stage: FirstStage, latents: Tensor) -> Tensor:
    """Images `(N, C_in, H, W)` in [-1, 1] of 8-bit values from raw latents, on the CPU."""
    parts = []
    for some in latents.split(_AT_ONCE):
        images = first_stage.decode(some.to(first_stage.device)).clamp(-1, 1)
        parts.append((images.add(1).mul(127.5).round() / 127.5 - 1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def sample_latents(diffusion: Diffusion, classes: Tensor, budget: Budget, seed: int) -> Tensor:
    """Raw latents `(N, C, h, w)` of these classes, without guidance, on the CPU.

    Args:
        diffusion: The trained transformer.
        classes: `(N,)`.
        budget: For the steps of the sampler.
        seed: Sample n starts from the same noise whatever the first stage.
    """
    device = next(diffusion.transformer.parameters()).device
    mean, std = (x[:, None, None].to(device) for x in (diffusion.mean, diffusion.std))
    parts = []
    for start in range(0, len(classes), _AT_ONCE):
        some = classes[start : start + _AT_ONCE].to(device)
        seeds = [(seed << 20) + start + n for n in range(len(some))]
        latents = standard_normals(seeds, diffusion.shape).to(device)
        diffusion.scheduler.set_timesteps(budget.inference_steps)
        for time in diffusion.scheduler.timesteps:
            predicted = diffusion.transformer(
                latents, timestep=time.expand(len(some)).to(device), class_labels=some
            ).sample
            latents = diffusion.scheduler.step(predicted, time, latents).prev_sample
        parts.append((latents * std + mean).cpu())
    return torch.cat(parts)
