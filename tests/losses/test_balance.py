"""The balance between terms, on gradients whose norms are known."""

import pytest
import torch

from first_stage.config.schema import BalanceConfig
from first_stage.losses.balance import Balance, gradient_at, mean_square_norm
from first_stage.losses.lagged_means import LaggedMeans


def gradient(norm: float, batch: int = 2) -> torch.Tensor:
    """The gradient of a mean over the batch whose samples' own gradients have this norm."""
    own = torch.zeros(batch, 1, 2, 2)
    own[:, :, 0, 1] = norm
    return own / batch


def weigh(balance: Balance, norms: dict[str, float], weights=None, ramps=None, batch: int = 2):
    ones = dict.fromkeys(norms, 1.0)
    gradients = {name: gradient(norm, batch) for name, norm in norms.items()}
    found, _ = balance.weighted(
        gradients, ones | (weights or {}), ones | (ramps or {}), torch.zeros(1), torch.zeros(1)
    )
    balance.means.finish_step(lambda t: t, balance.finishers())
    return {name: mean_square_norm(g).sqrt().item() for name, g in found.items()}


def make(**fields: object) -> Balance:
    config = BalanceConfig(**fields)
    return Balance(config, LaggedMeans(config.smoothing))


def test_norms_do_not_depend_on_the_batch():
    for batch in (1, 2, 7):
        assert mean_square_norm(gradient(3.0, batch)).item() == pytest.approx(9.0)


def test_a_gradient_survives_half_precision():
    leaf = torch.full((4, 3, 256, 256), 0.5, requires_grad=True)
    value = (leaf.half() * 2).float().mean()  # 1 / 786432 is far below what float16 can hold
    torch.testing.assert_close(gradient_at(value, leaf), torch.full_like(leaf, 2 / leaf.numel()))


def test_fixed_weights_are_what_they_are():
    found = weigh(
        make(kind="fixed"),
        {"pixel": 2.0, "learned": 3.0, "adversarial": 5.0},
        {"learned": 0.5, "adversarial": 0.1},
        {"adversarial": 0.5},
    )
    assert found == pytest.approx({"pixel": 2.0, "learned": 1.5, "adversarial": 0.25})


def test_adaptive_gives_the_adversarial_term_its_share_of_the_others_norm():
    balance = make(kind="adaptive", smoothing=0.0)
    norms = {"pixel": 3.0, "adversarial": 0.02}
    assert weigh(balance, norms, {"adversarial": 0.1})["adversarial"] == 0.0  # nothing is known
    assert weigh(balance, norms, {"adversarial": 0.1})["adversarial"] == pytest.approx(0.3)


def test_adaptive_factors_are_bounded():
    balance = make(kind="adaptive", smoothing=0.0, max_weight=7.0)
    norms = {"pixel": 3.0, "adversarial": 1e-9}
    weigh(balance, norms)
    assert weigh(balance, norms)["adversarial"] == pytest.approx(7e-9)


def test_target_shares_are_met():
    shares = {"pixel": 0.5, "learned": 0.3, "adversarial": 0.2}
    balance = make(kind="shares", shares=shares, smoothing=0.5)
    norms = {"pixel": 4.0, "learned": 100.0, "adversarial": 0.01}
    first = weigh(balance, norms, {"pixel": 2.0})
    assert first == {"pixel": 8.0, "learned": 0.0, "adversarial": 0.0}
    found = weigh(balance, norms, {"pixel": 2.0, "learned": 123.0})
    total = sum(found.values())
    assert {name: norm / total for name, norm in found.items()} == pytest.approx(shares)
    assert found["pixel"] == pytest.approx(8.0)  # it keeps its weight; the others follow it


def test_target_shares_are_smoothed_and_faded_in():
    shares = {"pixel": 0.5, "learned": 0.5}
    balance = make(kind="shares", shares=shares, smoothing=0.75)
    weigh(balance, {"pixel": 4.0, "learned": 2.0})
    weigh(balance, {"pixel": 4.0, "learned": 20.0})
    # mean square of the learned gradient: 0.75 * 4 + 0.25 * 400 = 103
    found = weigh(balance, {"pixel": 4.0, "learned": 20.0}, ramps={"learned": 0.1})
    assert found["learned"] == pytest.approx(0.1 * 20 * 4 / 103**0.5)


def test_a_split_batch_gives_the_same_factors():
    shares = {"pixel": 0.5, "learned": 0.5}
    whole, split = (make(kind="shares", shares=shares) for _ in range(2))
    norms = [{"pixel": 4.0, "learned": 2.0}, {"pixel": 1.0, "learned": 7.0}]
    both = {k: torch.cat([gradient(n[k]) / 2 for n in norms]) for k in shares}
    ones = dict.fromkeys(shares, 1.0)
    none = torch.zeros(1)
    whole.weighted(both, ones, ones, none, none)
    for n in norms:
        split.weighted({k: gradient(n[k]) for k in shares}, ones, ones, none, none)
    for balance in (whole, split):
        balance.means.finish_step(lambda t: t)
    for name in shares:
        torch.testing.assert_close(
            whole.means.get(f"shares/{name}"), split.means.get(f"shares/{name}")
        )
