"""The training step: one batch and one autoencoder pass for both players."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from first_stage.config.schema import Config, ModelConfig, TrainConfig
from first_stage.data import Batch, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.errors import ConfigError
from first_stage.losses.lagged_means import Meter
from first_stage.losses.objective import Judged, Objective
from first_stage.losses.penalties import clip_weights
from first_stage.models.critic import Critic, advance_spectral_norm, make_critic, update_average
from first_stage.models.first_stage import (
    FirstStage,
    build_autoencoder,
    load_autoencoder,
    require_kl,
)
from first_stage.seeding import Purpose, generator
from first_stage.training.checkpoint import Snapshot, flatten_optimizer, restore_optimizer

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Player(Generic[Network]):
    """One of the two networks that train against each other.

    Attributes:
        network: The module itself; its weights are what is saved.
        module: The same, wrapped by accelerate: the one to call.
        optimizer: AdamW over its parameters.
        learning_rate: Its peak.
    """

    network: Network
    module: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """The share of the peak learning rate that a step uses: warm-up, plateau, cosine decay.

    A function of the step alone, so it is the same on any number of processes and needs no state.
    """
    warm = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    decay_start = config.max_steps - config.decay_steps
    if step < decay_start:
        return warm
    progress = (step - decay_start + 1) / config.decay_steps
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return warm * (config.final_rate + (1.0 - config.final_rate) * cosine)


def make_first_stage(config: ModelConfig, resolution: int) -> FirstStage:
    """The first stage to train: a new one, or the pretrained one that is named.

    Raises:
        ConfigError: When the pretrained one has another number of image channels.
    """
    if config.pretrained is None:
        vae = build_autoencoder(
            in_channels=config.in_channels,
            latent_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            mid_block_attention=config.mid_block_attention,
            quant_conv=config.quant_conv,
            sample_size=resolution,
        )
    else:
        vae = require_kl(load_autoencoder(config.pretrained), config.pretrained)
        if vae.config.in_channels != config.in_channels:
            raise ConfigError(
                f"model.in_channels is {config.in_channels}, but model.pretrained "
                f"{config.pretrained!r} takes {vae.config.in_channels} channels"
            )
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    # Nothing in it acts otherwise in training mode (no dropout, no batch norm), in which diffusers'
    # residual blocks copy their largest inputs out of the channels-last layout: 8 % of a step.
    return FirstStage(vae).eval()


class Trainer:
    """Both players, their optimizers, the objective and the average of the weights.

    Args:
        config: The run's configuration.
        accelerator: Wraps the players, holds the loss scaler.
        processes: For averages over processes.
    """

    def __init__(self, config: Config, accelerator: Accelerator, processes: Processes):
        self.config, self.accelerator, self.processes = config, accelerator, processes
        self.objective = Objective(config.loss, accelerator.device, accelerator.autocast)
        torch.manual_seed(config.seed)
        first_stage = make_first_stage(config.model, config.data.resolution)
        own = list(self.objective.parameters.values())
        self.first_stage = self._player(first_stage, config.train.learning_rate, own)
        self.critic: Player[Critic] | None = None
        self.critic_ema: Critic | None = None
        if config.needs_critic:
            c = config.critic
            critic = make_critic(
                first_stage.in_channels, c.width, c.layers, c.norm, c.antialias, c.scales
            )
            if config.loss.learned.ema_decay > 0 and config.loss.learned.weight > 0:
                self.critic_ema = copy.deepcopy(critic).requires_grad_(False)
                self.critic_ema.to(accelerator.device)
            self.critic = self._player(critic, c.learning_rate or config.train.learning_rate)
        self.ema = EMAModel(self.vae.parameters(), decay=config.train.ema_decay, foreach=True)
        self.ema.to(accelerator.device)
        self.meter = Meter()

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder that is being trained."""
        return self.first_stage.network.vae

    def _player(
        self, network: Network, learning_rate: float, own: Sequence[nn.Parameter] = ()
    ) -> Player[Network]:
        # Convolutions are fastest on channels-last weights and images, on CPUs and GPUs alike.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module = self.accelerator.prepare_model(network)
        # The optimizers are not prepared: accelerate would update the loss scaler after each of
        # the two, and the second would unscale by another factor than its gradients carry.
        optimizer = torch.optim.AdamW(
            [*(p for p in network.parameters() if p.requires_grad), *own],
            lr=learning_rate,
            betas=self.config.train.betas,
            weight_decay=self.config.train.weight_decay,
            fused=True,
        )
        return Player(network, module, optimizer, learning_rate)

    def training_step(self, step: int, batches: Sequence[Batch]) -> None:
        """Update both players once.

        Args:
            step: Steps done before this one.
            batches: This process's micro-batches of the step.
        """
        encoder_steps = self.config.train.encoder_steps
        if encoder_steps is not None and step >= encoder_steps:
            self._decoder_alone(step)
        critic = self.critic if step >= self.config.critic.start_step else None
        encoder_learns = self.first_stage.network.encoder_learns
        players: dict[str, Player[Any]] = {"first_stage": self.first_stage}
        if critic is not None:
            players["critic"] = critic
        for number, batch in enumerate(batches):
            with self._synchronised(players, last=number == len(batches) - 1):
                # The autoencoder: every loss is differentiated down to the leaf, that is, to the
                # pixels of the reconstruction; one backward pass takes their sum further.
                images = images_from_pixels(batch.pixels)
                decoded, posterior, latents = self.first_stage.module(
                    images,
                    batch.noise,
                    prior=self._prior_samples(step, number, batch),
                    cut_off=self.objective.cuts_off(step) and encoder_learns,
                )
                leaf = decoded.detach().requires_grad_()
                judged = self._judge(critic, images, leaf) if critic is not None else None
                gradient, for_encoder, log = self.objective.gradient(
                    step, images, decoded, leaf, judged, self.first_stage.network.last_layer
                )
                direct, direct_log = self.objective.direct_loss(step, images, leaf, posterior)
                surrogate = (decoded * gradient).sum() + direct
                if for_encoder is not None and encoder_learns:  # the graph does not reach it
                    at_latents = self._at_latents(decoded, latents, for_encoder)
                    surrogate = surrogate + (posterior.sample(batch.noise) * at_latents).sum()
                self.accelerator.backward(surrogate / len(batches))

                # The critic: the verdicts are already there; their graph ends at the leaf.
                critic_log: dict[str, Tensor] = {}
                if critic is not None and judged is not None:
                    loss, critic_log = self.objective.critic_loss(judged, len(images))
                    if self.objective.penalises(step):
                        mix = self._mix(step, number, batch)
                        slopes = self.objective.penalty(critic.network.judge, images, leaf, mix)
                        loss, critic_log = loss + slopes[0], critic_log | slopes[1]
                    parameters = critic.parameters
                    self.accelerator.backward(loss / len(batches), inputs=parameters)
            self.meter.add(step, log | direct_log | critic_log, share=1 / len(batches))
        self._update(step, players)

    def _decoder_alone(self, step: int) -> None:
        """From its first step on, train the decoder against an encoder that stays as it is."""
        player = self.first_stage
        if step == self.config.train.encoder_steps:
            # The averaged encoder is the one that will be exported, so it is the one to decode for.
            self.ema.copy_to(self.vae.parameters())
        if not player.network.encoder_learns:
            return
        player.network.freeze_encoder()
        if player.module is not player.network:
            # The wrapper waits for a gradient of every parameter that asked for one when it was
            # made: a new one. Autocast, which went with the old one, comes back with it.
            self.accelerator.unwrap_model(player.module, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
            player.module = self.accelerator.prepare_model(player.network)

    def _update(self, step: int, players: dict[str, Player[Any]]) -> None:
        """Clip and apply the players' gradients; then whatever counts steps counts one."""
        scaler = self.accelerator.scaler
        share = learning_rate_share(step, self.config.train)
        for parameter in self.objective.parameters.values():  # no wrapper averages these
            if parameter.grad is not None:
                parameter.grad = self.processes.average(parameter.grad)
        for name, player in players.items():
            player.optimizer.param_groups[0]["lr"] = player.learning_rate * share
            if scaler is not None:
                scaler.unscale_(player.optimizer)
            limit = self.config.train.clip_norm or float("inf")
            norm = nn.utils.clip_grad_norm_(player.parameters, limit)
            if scaler is None:
                player.optimizer.step()
                self.meter.add(step, {f"gradient_norm/{name}": norm})
            else:  # skips the update, and lowers the scale, where a gradient overflowed
                scaler.step(player.optimizer)
            player.optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()
        self.ema.step(self.vae.parameters())
        if "critic" in players:
            self._after_critic(step, players["critic"].network)
        self.objective.finish_step(self.processes.average)

    def _after_critic(self, step: int, critic: Critic) -> None:
        """What follows an update of the critic: bounds on its weights, and its average."""
        if (limit := self.config.loss.adversarial.clip_weights) > 0:
            clip_weights(critic.parameters(), limit)
        advance_spectral_norm(critic)
        if self.critic_ema is not None:
            updates = step - self.config.critic.start_step
            warm = (1 + updates) / (10 + updates)
            update_average(self.critic_ema, critic, min(self.config.loss.learned.ema_decay, warm))

    def _judge(self, critic: Player[Critic], images: Tensor, leaf: Tensor) -> Judged:
        """The critic's verdicts, and its average's where that is the yardstick."""
        yardsticks = None
        if self.critic_ema is not None:
            with self.accelerator.autocast():
                with torch.no_grad():
                    reals = self.critic_ema(images).features
                yardsticks = (reals, self.critic_ema(leaf[: len(images)]).features)
        return Judged(critic.module(images), critic.module(leaf), yardsticks)

    def _at_latents(self, decoded: Tensor, latents: Tensor, gradient: Tensor) -> Tensor:
        """Take a gradient at the pixels back through the decoder to the latents it decoded."""
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()  # float16 would lose small gradients
        (found,) = torch.autograd.grad(decoded, latents, scale * gradient, retain_graph=True)
        return found / scale

    def _prior_samples(self, step: int, number: int, batch: Batch) -> Tensor | None:
        """Latents that are decoded beside the batch, for the critic alone."""
        adversarial = self.config.loss.adversarial
        wanted = adversarial.prior_samples and adversarial.weight > 0
        if not wanted or step < self.config.critic.start_step:
            return None
        draws = [
            generator(self.config.seed, Purpose.PRIOR, position).standard_normal(
                batch.noise.shape[1:], dtype=np.float32
            )
            for position in self._positions(step, number, batch)
        ]
        return torch.from_numpy(np.stack(draws)).to(batch.noise.device)

    def _mix(self, step: int, number: int, batch: Batch) -> Tensor:
        """Where between each real and its fake the critic's slope is measured, `(B,)`."""
        draws = [
            generator(self.config.seed, Purpose.MIX, position).random()
            for position in self._positions(step, number, batch)
        ]
        return torch.tensor(draws, dtype=torch.float32, device=batch.noise.device)

    def _positions(self, step: int, number: int, batch: Batch) -> range:
        """Places of a micro-batch's samples in the stream of samples."""
        size = self.config.train.batch_size
        count = len(batch.noise)
        first = step * size + self.processes.rank * (size // self.processes.world) + number * count
        return range(first, first + count)

    @contextlib.contextmanager
    def _synchronised(self, players: dict[str, Player[Any]], last: bool) -> Iterator[None]:
        """Average the gradients over processes only in a step's last micro-batch."""
        with contextlib.ExitStack() as stack:
            if not last:
                for player in players.values():
                    stack.enter_context(self.accelerator.no_sync(player.module))
            yield

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[AutoencoderKL]:
        """The autoencoder with its averaged weights, for the time being."""
        parameters = list(self.vae.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield self.vae
        finally:
            self.ema.restore(parameters)

    def snapshot(self, step: int) -> Snapshot:
        """What a checkpoint needs beside the averaged weights. Every process must call it.

        The tensors are the live ones: write or copy them before the next step.
        """
        tensors: dict[str, dict[str, Tensor]] = {
            "first_stage": dict(self.vae.state_dict()),
            "optimizers": flatten_optimizer(self.first_stage.optimizer, "first_stage"),
            "means": {f"objective.{k}": v for k, v in self.objective.state_dict().items()}
            | {f"meter.{k}": v for k, v in self.meter.state_dict(self.processes.stack).items()},
        }
        if self.critic is not None:
            tensors["critic"] = dict(self.critic.network.state_dict())
            if self.critic_ema is not None:
                tensors["critic_ema"] = dict(self.critic_ema.state_dict())
            tensors["optimizers"] |= flatten_optimizer(self.critic.optimizer, "critic")
        scaler = self.accelerator.scaler
        state: dict[str, Any] = {
            "ema_steps": self.ema.optimization_step,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return Snapshot(step, tensors, state)

    def restore(self, snapshot: Snapshot, ema: AutoencoderKL) -> None:
        """Take back what `snapshot` gave, and the averaged weights."""
        device = self.accelerator.device
        tensors = snapshot.tensors
        self.vae.load_state_dict(tensors["first_stage"])
        restore_optimizer(self.first_stage.optimizer, tensors["optimizers"], "first_stage")
        if self.critic is not None:
            self.critic.network.load_state_dict(tensors["critic"])
            if self.critic_ema is not None:
                self.critic_ema.load_state_dict(tensors["critic_ema"])
            restore_optimizer(self.critic.optimizer, tensors["optimizers"], "critic")
        self.ema.shadow_params = [p.detach().clone().to(device) for p in ema.parameters()]
        self.ema.optimization_step = snapshot.state["ema_steps"]
        if self.accelerator.scaler is not None and snapshot.state["scaler"]:
            self.accelerator.scaler.load_state_dict(snapshot.state["scaler"])
        means = {k: v.to(device) for k, v in tensors["means"].items()}
        self.objective.load_state_dict(_without_prefix(means, "objective."))
        self.meter.load_state_dict(
            _without_prefix(means, "meter."), self.processes.rank, self.processes.world
        )


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
