"""The training step: one batch and one autoencoder pass for both players."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from first_stage.config.schema import Config
from first_stage.data import Batch, images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.losses.objective import Objective
from first_stage.losses.penalties import clip_weights
from first_stage.losses.terms import CriticOutputs, Inputs
from first_stage.models.critic import (
    Critic,
    advance_spectral_norm,
    update_average,
)
from first_stage.models.disturb import Disturbance, check_disturb
from first_stage.models.first_stage import FirstStage, lay_out
from first_stage.models.parts import select_parts
from first_stage.seeding import Purpose, to_device
from first_stage.spans import span
from first_stage.training.checkpoint import Snapshot, flatten_optimizer, restore_optimizer
from first_stage.training.compiling import compile_blocks, uncompiled
from first_stage.training.draws import disturbance, normals, uniforms
from first_stage.training.meter import Meter
from first_stage.training.players import (
    Network,
    Player,
    build_critic,
    keep_original,
    learning_rate_share,
    make_first_stage,
    make_optimizer,
)


class Trainer:
    """Both players, their optimizers, the objective and the average of the weights.

    Args:
        config: The run's configuration.
        accelerator: Wraps the players, holds the loss scaler.
        processes: For averages over processes.
    """

    def __init__(self, config: Config, accelerator: Accelerator, processes: Processes):
        self.config, self.accelerator, self.processes = config, accelerator, processes
        torch.manual_seed(config.seed)
        first_stage = make_first_stage(config.model, config.data.resolution)
        select_parts(first_stage, config.train.parts)
        check_disturb(config.disturb, first_stage.bottleneck, first_stage.latent_channels)
        critic = build_critic(config.critic, first_stage) if config.needs_critic else None
        self.original = keep_original(config, first_stage, accelerator.device)
        self.objective = Objective(
            config.loss,
            accelerator.device,
            accelerator.autocast,
            first_stage.bottleneck.weights,
            self.original,
        )
        rate, extra = config.train.learning_rate, list(self.objective.parameters.values())
        self.first_stage = self._player(first_stage, rate, extra)
        self.critic: Player[Critic] | None = None
        self.critic_ema: Critic | None = None
        if critic is not None:
            if config.loss.learned.ema_decay > 0 and config.loss.learned.weight > 0:
                self.critic_ema = copy.deepcopy(critic).requires_grad_(False)
                self.critic_ema.to(accelerator.device)
            self.critic = self._player(critic, config.critic.learning_rate or rate)
        self.ema = EMAModel(first_stage.parameters(), decay=config.train.ema_decay, foreach=True)
        self.ema.to(accelerator.device)
        self.meter = Meter()

    def _player(
        self, network: Network, learning_rate: float, extra: Sequence[nn.Parameter] = ()
    ) -> Player[Network]:
        lay_out(network)
        if self.config.train.compile and self._compiles(network):
            compile_blocks(network.to(self.accelerator.device), self.accelerator.device)
        module = self.accelerator.prepare_model(network)
        # The optimizers are not prepared: accelerate would update the loss scaler after each of
        # the two, and the second would unscale by another factor than its gradients carry.
        learned = [*(p for p in network.parameters() if p.requires_grad), *extra]
        optimizer = make_optimizer(learned, learning_rate, self.config.train)
        return Player(network, module, optimizer, learning_rate)

    def _compiles(self, network: nn.Module) -> bool:
        """Whether a network's blocks can be compiled: none that is differentiated twice."""
        penalized = self.objective.critic.penalizes(0)
        return not (isinstance(network, Critic) and penalized)

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
            with self._synchronized(players, last=number == len(batches) - 1):
                # The autoencoder: every loss is differentiated down to the pixels of what was
                # decoded; one backward pass takes their sum further.
                images = images_from_pixels(batch.pixels)
                with span("first stage"):
                    output = self.first_stage.module(
                        images,
                        self.noise(batch),
                        prior=self._prior_samples(step, batch),
                        cut_off=self.objective.cuts_off(step) and encoder_learns,
                        disturbance=self._disturbance(step, batch) if encoder_learns else None,
                        encoded=batch.encoded,
                    )
                decoded, targets = output.images.detach().requires_grad_(), output.targets
                with span("critic"):
                    outputs = None if critic is None else self._look(critic, targets, decoded)
                inputs = Inputs(step, targets, decoded, outputs, images)
                with span("losses"):
                    gradient = self.objective.gradient(
                        inputs, output.images, self.first_stage.network.last_layer
                    )
                    latent, latent_log = self.objective.latent_loss(inputs, output.code)
                # d(loss)/d(weights) = <d(loss)/d(pixels), d(pixels)/d(weights)>.
                surrogate = (output.images * gradient.decoder).sum() + latent
                if gradient.encoder is not None and encoder_learns:  # the graph does not reach it
                    at_latents = self._at_latents(output.images, output.latents, gradient.encoder)
                    surrogate = surrogate + (output.code.latents * at_latents).sum()
                with span("backward"):
                    self.accelerator.backward(surrogate / len(batches))

                # The critic: its outputs are already there; their graph ends at the pixels.
                critic_log: dict[str, Tensor] = {}
                if critic is not None and outputs is not None:
                    with span("critic losses"):
                        loss, critic_log = self.objective.critic.loss(outputs)
                        if self.objective.critic.penalizes(step):
                            found, log = self.objective.critic.penalty(
                                critic.network.logits, targets, decoded, self._mix(batch)
                            )
                            loss, critic_log = loss + found, critic_log | log
                    with span("critic backward"):
                        parameters = critic.parameters
                        self.accelerator.backward(loss / len(batches), inputs=parameters)
            log = gradient.log | latent_log | critic_log
            self.meter.add(step, log, share=1 / len(batches))
        with span("update"):
            self._update(step, players)

    def _decoder_alone(self, step: int) -> None:
        """From its first step on, train the decoder against an encoder that stays as it is."""
        player = self.first_stage
        if step == self.config.train.encoder_steps:
            # The averaged encoder is the one that will be exported, so it is the one to decode for.
            self.ema.copy_to(player.network.parameters())
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
        own = [p for p in self.objective.parameters.values() if p.grad is not None]
        if own:  # no wrapper averages these
            flat = torch.cat([p.grad.flatten() for p in own if p.grad is not None])
            parts = self.processes.average(flat).split([p.numel() for p in own])
            for parameter, part in zip(own, parts, strict=True):
                parameter.grad = part.view_as(parameter).clone()
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
        network = self.first_stage.network
        jumped = network.bottleneck.finish_step(step, self.processes, self.config.seed)
        self.ema.step(network.parameters())
        self._follow(jumped)
        if "critic" in players:
            self._after_critic(step, players["critic"].network)
        self.objective.finish_step(self.processes.average)

    def _follow(self, jumped: Mapping[str, Tensor]) -> None:
        """Let the average take rows that jumped as they are: halfway it would mean neither."""
        if not jumped:
            return
        bottleneck = self.first_stage.network.bottleneck
        averaged = self.ema.shadow_params[-len(list(bottleneck.parameters())) :]
        for (name, value), average in zip(bottleneck.named_parameters(), averaged, strict=True):
            if (rows := jumped.get(name)) is not None:
                mask = rows.view(-1, *[1] * (value.ndim - 1))
                average.copy_(torch.where(mask, value.detach(), average))

    def _after_critic(self, step: int, critic: Critic) -> None:
        """What follows an update of the critic: bounds on its weights, and its average."""
        if (limit := self.config.loss.adversarial.clip_weights) > 0:
            clip_weights(critic.parameters(), limit)
        advance_spectral_norm(critic)
        if self.critic_ema is not None:
            updates = step - self.config.critic.start_step
            warm = (1 + updates) / (10 + updates)
            update_average(self.critic_ema, critic, min(self.config.loss.learned.ema_decay, warm))

    def _look(self, critic: Player[Critic], images: Tensor, decoded: Tensor) -> CriticOutputs:
        """What the critic makes of images and fakes; its average too, where that measures."""
        averaged = None
        if self.critic_ema is not None:
            with self.accelerator.autocast():
                with torch.no_grad():
                    reals = self.critic_ema(images).features
                averaged = (reals, self.critic_ema(decoded[: len(images)]).features)
        return CriticOutputs(critic.module(images), critic.module(decoded), averaged)

    def _at_latents(self, decoded: Tensor, latents: Tensor, gradient: Tensor) -> Tensor:
        """Take a gradient at the pixels back through the decoder to the latents it decoded."""
        scaler = self.accelerator.scaler
        # Float16 would lose small gradients. The scale stays on the device: nothing waits for it.
        scale = 1.0 if scaler is None else scaler.scale(gradient.new_ones(()))
        (found,) = torch.autograd.grad(decoded, latents, scale * gradient, retain_graph=True)
        return found / scale

    # -- draws: functions of the seed and the samples' positions --------------------------------

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        """`(C, h, w)` of a micro-batch's latents."""
        return self.first_stage.network.latent_shape(*batch.pixels.shape[1:3])

    def noise(self, batch: Batch) -> Tensor:
        """Posterior noise, `(B, C, h, w)`."""
        return self._normals(Purpose.NOISE, batch)

    def _prior_samples(self, step: int, batch: Batch) -> Tensor | None:
        """Latents that are decoded beside the batch, for the critic alone."""
        adversarial = self.config.loss.adversarial
        wanted = adversarial.prior_samples and adversarial.weight > 0
        if not wanted or step < self.config.critic.start_step:
            return None
        return self._normals(Purpose.PRIOR, batch)

    def _disturbance(self, step: int, batch: Batch) -> Disturbance | None:
        """What is done to the latents of a micro-batch before they are decoded."""
        config = self.config.disturb
        if not config.in_use:
            return None
        shape = self.latent_shape(batch)
        drawn = disturbance(self.config.seed, config, step, batch.positions, shape)
        device = batch.pixels.device
        return Disturbance(
            drawn.geometry, *(t if t is None else to_device(t, device) for t in drawn[1:])
        )

    def _normals(self, purpose: Purpose, batch: Batch) -> Tensor:
        drawn = normals(self.config.seed, purpose, batch.positions, self.latent_shape(batch))
        return to_device(drawn, batch.pixels.device)

    def _mix(self, batch: Batch) -> Tensor:
        """Where between each real and its fake the critic's slope is measured, `(B,)`."""
        drawn = uniforms(self.config.seed, Purpose.MIX, batch.positions)
        return to_device(drawn, batch.pixels.device)

    @contextlib.contextmanager
    def _synchronized(self, players: dict[str, Player[Any]], last: bool) -> Iterator[None]:
        """Average the gradients over processes only in a step's last micro-batch."""
        with contextlib.ExitStack() as stack:
            if not last:
                for player in players.values():
                    stack.enter_context(self.accelerator.no_sync(player.module))
            yield

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[FirstStage]:
        """The first stage with its averaged weights, for the time being."""
        network = self.first_stage.network
        parameters = list(network.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        network.bottleneck.bake(network.model)
        try:
            with uncompiled(self.config.train.compile):
                yield network
        finally:
            self.ema.restore(parameters)

    @contextlib.contextmanager
    def averaged_model(self) -> Iterator[Any]:
        """The diffusers model with the averaged weights, for the time being."""
        with self.ema_weights() as stage:
            yield stage.model

    def snapshot(self, step: int) -> Snapshot:
        """What a checkpoint needs beside the averaged weights. Every process must call it.

        The tensors are the live ones: write or copy them before the next step.
        """
        network = self.first_stage.network
        tensors: dict[str, dict[str, Tensor]] = {
            "first_stage": dict(network.model.state_dict()),
            "optimizers": flatten_optimizer(self.first_stage.optimizer, "first_stage"),
            "means": {f"objective.{k}": v for k, v in self.objective.state_dict().items()}
            | {f"meter.{k}": v for k, v in self.meter.state_dict(self.processes.stack).items()},
        }
        if bottleneck := network.bottleneck.state_dict():
            tensors["bottleneck"] = dict(bottleneck)
            averaged = self.ema.shadow_params[len(list(network.model.parameters())) :]
            tensors["bottleneck_ema"] = {f"{n}": p for n, p in enumerate(averaged)}
        if self.original is not None:
            tensors["original"] = dict(self.original.state_dict())
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

    def restore(self, snapshot: Snapshot, ema: nn.Module) -> None:
        """Take back what `snapshot` gave, and the averaged weights of the diffusers model."""
        device = self.accelerator.device
        tensors = snapshot.tensors
        network = self.first_stage.network
        network.model.load_state_dict(tensors["first_stage"])
        if "bottleneck" in tensors:
            network.bottleneck.load_state_dict(tensors["bottleneck"])
        if self.original is not None:
            self.original.load_state_dict(tensors["original"])
        restore_optimizer(self.first_stage.optimizer, tensors["optimizers"], "first_stage")
        if self.critic is not None:
            self.critic.network.load_state_dict(tensors["critic"])
            if self.critic_ema is not None:
                self.critic_ema.load_state_dict(tensors["critic_ema"])
            restore_optimizer(self.critic.optimizer, tensors["optimizers"], "critic")
        averaged = tensors.get("bottleneck_ema", {})
        shadow = [*ema.parameters(), *(averaged[str(n)] for n in range(len(averaged)))]
        # Files hold row-major tensors; beside weights that lie otherwise in memory the average of a
        # step takes half as long again.
        self.ema.shadow_params = [
            torch.empty_like(weight, requires_grad=False).copy_(average.detach())
            for weight, average in zip(self.first_stage.network.parameters(), shadow, strict=True)
        ]
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
