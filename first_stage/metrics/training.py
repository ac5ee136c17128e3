"""What tells whether the game between the players goes well: numbers for the log, and words."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from first_stage.metrics.latents import is_active

EXPLODED = 1000.0
"""Nats per latent value above which no useful latent lies: its magnitude is then about 45."""


@torch.no_grad()
def critic_log(real_logits: Tensor, fake_logits: Tensor, boundary: float) -> dict[str, Tensor]:
    """How well the critic does.

    Args:
        real_logits: `(B, S, h, w)`.
        fake_logits: The same shape.
        boundary: The logit above which it calls a patch real.

    Returns:
        Mean logits, their gap, the share of patches that it judges right, of reals and of fakes,
        and the share of patches whose real has the higher logit (`critic/ranking`), which means
        the same for losses without a boundary.
    """
    return {
        "critic/real_logit": real_logits.mean(),
        "critic/fake_logit": fake_logits.mean(),
        "critic/logit_gap": real_logits.mean() - fake_logits.mean(),
        "critic/real_accuracy": (real_logits > boundary).float().mean(),
        "critic/fake_accuracy": (fake_logits < boundary).float().mean(),
        "critic/ranking": (real_logits > fake_logits).float().mean(),
    }


_FEW_CODES = 0.1
"""Share of the codes below which the log warns."""
_SIGNAL = ("signal_mean", "signal_square", "noise_square")
_CONSUMED = ("square_norm/", "latent_square_norm/", "inner/", *(f"{name}/" for name in _SIGNAL))


def derived(values: Mapping[str, float]) -> dict[str, float]:
    """What a log line says beyond plain averages; none of it depends on how a batch is split.

    Args:
        values: Averages over steps. `square_norm/x` and `inner/x` as `Objective.gradient` gives
            them, `signal_mean/n`, `signal_square/n` and `noise_square/n` as a Gaussian bottleneck
            does.

    Returns:
        All of them but `square_norm` and `inner`, and instead: `norm/x`, the norm of each term's
        gradient; `share/x`, its share of the sum of these norms; `cosine/x`, the cosine between
        its gradient and the pixel term's (near 0 it adds something of its own, near 1 it repeats
        the pixel term, below 0 the two pull in opposite directions); `latent_norm/x` and
        `latent_share/x`, the same of what acts on the latents directly; `kl/active_channels`, the
        number of channels that carry signal (see `metrics.latents.is_active`).
    """
    result = {k: v for k, v in values.items() if not k.startswith(_CONSUMED)}
    for where in ("latent_", ""):
        norms = {k: math.sqrt(v) for k, v in _under(f"{where}square_norm/", values).items()}
        total = sum(norms.values())
        for name, norm in norms.items():
            result[f"{where}norm/{name}"] = norm
            result[f"{where}share/{name}"] = norm / total if total > 0 else 0.0
    for name, inner in _under("inner/", values).items():
        size = norms[name] * norms["pixel"]
        result[f"cosine/{name}"] = inner / size if size > 0 else 0.0
    means, squares, noises = (_under(f"{name}/", values) for name in _SIGNAL)
    if means:
        signals = {n: squares[n] - mean**2 for n, mean in means.items()}
        active = sum(is_active(signal, noises[n]) for n, signal in signals.items())
        result["kl/active_channels"] = float(active)
    return result


def _under(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


class Watch:
    """Turns the log into warnings, each said once.

    Args:
        patience: Log lines in a row that a state must last before it is called by its name.
    """

    def __init__(self, patience: int = 3):
        self.patience = patience
        self._seen: dict[str, int] = {}

    def read(self, step: int, values: Mapping[str, float]) -> list[str]:
        """The warnings that a log line gives rise to.

        Args:
            step: Steps done.
            values: Averages since the last line, by name.
        """
        found = dict(_states(values))
        self._seen = {name: self._seen.get(name, 0) + 1 for name in found}
        return [
            f"warning at step {step}: {found[name]}"
            for name, count in self._seen.items()
            if count == self.patience
        ]


def _states(values: Mapping[str, float]) -> list[tuple[str, str]]:
    states = []
    ranking, gap = values.get("critic/ranking"), values.get("critic/logit_gap", 0.0)
    if ranking is not None and ranking > 0.98:
        states.append(
            (
                "won",
                f"the critic has won: it puts {ranking:.0%} of real patches above the "
                f"reconstructed ones (logit gap {gap:.2f}), so its verdict teaches little. Lower "
                "critic.learning_rate, or restrain it with loss.adversarial.r1 or lecam",
            )
        )
    if ranking is not None and abs(ranking - 0.5) < 0.02 and abs(gap) < 0.01:
        states.append(
            (
                "collapsed",
                f"the critic has collapsed: it cannot tell reals from reconstructions (ranking "
                f"{ranking:.2f}, logit gap {gap:.3f}). Raise critic.learning_rate, or lower "
                "loss.adversarial.r1, lecam or gradient_penalty",
            )
        )
    active = values.get("kl/active_channels")
    if active is not None and active < 0.5:
        states.append(
            (
                "kl",
                "the KL has collapsed: no latent channel carries signal beyond its noise, so the "
                "decoder sees nothing of the image. Lower loss.kl_weight, raise "
                "loss.kl_ramp_steps, or allow loss.free_bits",
            )
        )
    widest = max(_under("kl_channel/", values).values(), default=0.0)
    if widest > EXPLODED:
        states.append(
            (
                "exploded",
                f"the KL explodes: a latent channel carries {widest:.3g} nats per value (useful "
                "ones carry tens), so its values run away. Raise loss.kl_weight, or lower "
                "train.learning_rate",
            )
        )
    used, perplexity = values.get("codes/used"), values.get("codes/perplexity", 0.0)
    if used is not None and used < _FEW_CODES:
        states.append(
            (
                "codes",
                f"only {used:.0%} of the codes are used: the others are paid for in vain "
                f"(perplexity {perplexity:,.0f}). Use model.vq.rule linear, restart unused codes "
                "sooner (model.vq.restart_after), take fewer codes, or model.family fsq",
            )
        )
    return states
