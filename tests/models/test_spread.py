"""The price on vectors that crowd."""

import torch
from toy_codes import codes_in_effect

from first_stage.models import spread
from first_stage.models.codebooks import LinearCodebook
from first_stage.models.spread import crowding

SHAPE = (3, 4, 5, 6)


def latents():
    torch.manual_seed(0)
    uneven = torch.tensor([2.0, 1.0, 0.1, 0.01], dtype=torch.float64).view(1, 4, 1, 1)
    return 5 + torch.randn(SHAPE, dtype=torch.float64) * uneven


def by_hand(sample):
    """Of `(N, D)` vectors, pair by pair."""
    count, total = len(sample), 0.0
    size = (sample - sample.mean(0)).square().sum(1).mean()
    for i in range(count):
        others = [(sample[i] - sample[n]).square().sum() for n in range(count) if n != i]
        total = total - (min(others) + spread._CLOSE**2 * size).log() / 2
    return size.log() / 2 + total / count


def test_gradient_and_value_are_those_of_the_definition():
    z = latents().requires_grad_()
    found = crowding(z)
    expected = torch.stack([by_hand(sample.flatten(1).mT) for sample in z])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(3, dtype=torch.float64)
    (ours,) = torch.autograd.grad((found * upstream).sum(), z)
    (theirs,) = torch.autograd.grad((expected * upstream).sum(), z)
    torch.testing.assert_close(ours, theirs)
    assert (ours != 0).any()


def test_a_sample_pays_for_itself_alone(monkeypatch):
    z = latents().float()
    expected = crowding(z)
    monkeypatch.setattr(spread, "_AT_ONCE", 1)
    assert torch.equal(crowding(z), expected)
    assert torch.equal(torch.cat([crowding(z[:1]), crowding(z[1:])]), expected)


def test_a_round_cloud_pays_least_whatever_its_size():
    torch.manual_seed(0)
    cloud = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    line = cloud * torch.tensor([1, 0.05, 0.05, 0.05]).view(1, 4, 1, 1)
    tails = cloud * torch.randn(1, 1, 16, 16).double().abs().pow(3)
    assert crowding(cloud) < crowding(line) - 1
    assert crowding(cloud) < crowding(tails) - 0.3  # the same covariance would be no comfort
    torch.testing.assert_close(crowding(100 * cloud + 7), crowding(cloud))


def test_where_there_is_nothing_to_compare_nothing_is_paid_for():
    one = torch.randn(2, 4, 1, 1, requires_grad=True)
    crowding(one).sum().backward()
    assert (crowding(one) == 0).all()
    assert (one.grad == 0).all()
    same = torch.ones(2, 4, 3, 3, requires_grad=True)
    crowding(same).sum().backward()
    assert torch.isfinite(crowding(same)).all()
    assert torch.isfinite(same.grad).all()


def test_autocast_changes_nothing():
    z = latents().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = crowding(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, crowding(z))


def trained(weight):
    """How many codes of 256 are used in effect."""
    prices = {**LinearCodebook.weights, "spread": weight}
    strong = [1, 0.1, 0.05, 0.05, 0.02, 0.02]
    return codes_in_effect(lambda: LinearCodebook(256, 4), 4, prices, strong, steps=300)


def test_it_keeps_codes_in_use_that_else_lie_beside_a_line():
    assert trained(LinearCodebook.weights["spread"]) > 1.5 * trained(0.0)


def test_it_is_among_the_penalties_by_its_name():
    code = LinearCodebook(16, 4)(torch.randn(2, 4, 3, 3))
    assert set(code.penalties) == set(LinearCodebook.weights)
    assert code.penalties["spread"].shape == (2,)
