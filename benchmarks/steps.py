"""Training steps as public trainers write them, for `python -m benchmarks train` to compare with.

Both are written from their description (latent-diffusion's and VQGAN's training): the adaptive
weight takes two `autograd.grad` calls down to the decoder's last layer, after which the whole loss
is differentiated once more. `two_pass_step` also encodes and decodes the batch a second time for
the critic. They use our networks, losses and optimizers, so that only the form of the step differs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from first_stage.data import Batch, images_from_pixels
from first_stage.losses.learned import feature_distances
from first_stage.losses.pixel import pixel_error
from first_stage.losses.terms import Inputs
from first_stage.training.players import Player
from first_stage.training.step import Trainer


def one_pass_step(trainer: Trainer, batch: Batch) -> None:
    """One pass of the autoencoder; the critic sees its detached reconstruction."""
    images = _images(trainer, batch)
    reconstruction = _first_stage_update(trainer, images, trainer.noise(batch))
    _critic_update(trainer, images, reconstruction)


def two_pass_step(trainer: Trainer, batch: Batch) -> None:
    """A full pass for each player, as with one optimizer index after the other."""
    images = _images(trainer, batch)
    _first_stage_update(trainer, images, trainer.noise(batch))
    reconstruction = trainer.first_stage.module(images, trainer.noise(batch)).images
    _critic_update(trainer, images, reconstruction)


def as_written(trainer: Trainer) -> None:
    """What public trainers leave at its default: mode, memory layout, optimizer, moving average."""
    trainer.first_stage.network.train()
    trainer.ema.foreach = False
    for network in trainer.objective.surroundings.networks:
        network.to(memory_format=torch.contiguous_format)
    for player in [p for p in (trainer.first_stage, trainer.critic) if p is not None]:
        player.network.to(memory_format=torch.contiguous_format)
        group = player.optimizer.param_groups[0]
        player.optimizer = torch.optim.AdamW(
            player.parameters, lr=group["lr"], betas=group["betas"]
        )


def _images(trainer: Trainer, batch: Batch) -> Tensor:
    """In the memory layout of the weights."""
    images, weight = images_from_pixels(batch.pixels), trainer.first_stage.network.last_layer
    ours = weight.is_contiguous(memory_format=torch.channels_last)
    return images if ours else images.contiguous()


def first_stage_loss(trainer: Trainer, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The autoencoder's loss in the usual form, with the adaptive weight of this very batch.

    Returns:
        The loss and the reconstruction, both with their graph.
    """
    config = trainer.config.loss
    stage, critic = trainer.first_stage, trainer.critic
    reconstruction, code, *_ = stage.module(images, noise)
    pixel = pixel_error(
        reconstruction, images, config.pixel, config.huber_delta, config.pixel_cutoff
    )
    others = config.pixel_weight * pixel
    for name in ("vgg", "lpips", "gram"):
        if (term := trainer.objective.terms.get(name)) is not None:
            others = others + term.weight * term.value(Inputs(0, images, reconstruction))
    adversarial = reconstruction.new_zeros(())
    factor = adversarial
    if critic is not None:
        fakes = critic.module(reconstruction)
        if config.learned.weight > 0:
            with torch.no_grad():
                reals = critic.module(images)
            distances = feature_distances(fakes.features, reals.features, config.learned.distance)
            magnitudes = trainer.objective.means.get("magnitude")
            if magnitudes is not None:
                distances = distances / magnitudes
            others = others + config.learned.weight * distances.mean()
        adversarial = trainer.objective.critic.pair.generator(fakes.logits, fakes.logits)
        factor = _adaptive_weight(others, adversarial, stage.network.last_layer)
    kl = config.kl_weight * code.penalties["kl"].mean() / images[0].numel()
    return others + config.adversarial.weight * factor * adversarial + kl, reconstruction


def _adaptive_weight(others: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    (target,) = torch.autograd.grad(others, last_layer, retain_graph=True)
    (current,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (target.norm() / (current.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def _first_stage_update(trainer: Trainer, images: Tensor, noise: Tensor) -> Tensor:
    if trainer.critic is not None:
        trainer.critic.network.requires_grad_(False)
    loss, reconstruction = first_stage_loss(trainer, images, noise)
    trainer.accelerator.backward(loss)
    if trainer.critic is not None:
        trainer.critic.network.requires_grad_(True)
    apply(trainer, trainer.first_stage)
    return reconstruction


def _critic_update(trainer: Trainer, images: Tensor, reconstruction: Tensor) -> None:
    critic = trainer.critic
    if critic is None:
        return
    reals, fakes = critic.module(images), critic.module(reconstruction.detach())
    trainer.accelerator.backward(trainer.objective.critic.pair.critic(reals.logits, fakes.logits))
    apply(trainer, critic)


def apply(trainer: Trainer, player: Player[Any]) -> None:
    """Clip and apply a player's gradients; the first stage's average follows."""
    limit = trainer.config.train.clip_norm or float("inf")
    nn.utils.clip_grad_norm_(player.parameters, limit)
    player.optimizer.step()
    player.optimizer.zero_grad(set_to_none=True)
    if player is trainer.first_stage:
        trainer.ema.step(player.network.parameters())
