"""What the log says of the game, in numbers and in words."""

import json

import pytest
import torch

from first_stage.metrics.training import Watch, critic_log, derived
from first_stage.report.training import read_run, training_section


def test_the_critics_accuracy_by_hand():
    reals = torch.tensor([2.0, 0.4, -1.0, 0.6])
    fakes = torch.tensor([-3.0, 0.5, 1.0, -0.5])
    log = {name: value.item() for name, value in critic_log(reals, fakes, 0.0).items()}
    assert log["critic/real_accuracy"] == 0.75
    assert log["critic/fake_accuracy"] == 0.5
    assert log["critic/ranking"] == 0.5
    assert log["critic/logit_gap"] == pytest.approx(0.5 - -0.5)
    # least squares decides at 1/2
    log = critic_log(reals, fakes, 0.5)
    assert log["critic/real_accuracy"].item() == 0.5


def test_shares_and_cosines_by_hand():
    found = derived(
        {
            "square_norm/pixel": 4.0,
            "square_norm/learned": 9.0,
            "inner/learned": -3.0,
            "square_norm/adversarial": 0.0,
            "inner/adversarial": 0.0,
            "loss/pixel": 0.5,
        }
    )
    assert found == pytest.approx(
        {
            "norm/pixel": 2.0,
            "norm/learned": 3.0,
            "norm/adversarial": 0.0,
            "share/pixel": 0.4,
            "share/learned": 0.6,
            "share/adversarial": 0.0,
            "cosine/learned": -0.5,
            "cosine/adversarial": 0.0,
            "loss/pixel": 0.5,
        }
    )


def test_active_channels_by_hand():
    # Of a channel's means: E[m^2] - E[m]^2 against a hundredth of the noise's variance.
    values = {"signal_mean/0": 3.0, "signal_square/0": 9.001, "noise_square/0": 1.0}
    values |= {"signal_mean/1": 0.0, "signal_square/1": 0.02, "noise_square/1": 1.0}
    found = derived({**values, "kl_channel/1": 0.2})
    assert found == {"kl/active_channels": 1, "kl_channel/1": 0.2}


GOOD = {"critic/ranking": 0.7, "critic/logit_gap": 0.8, "kl/active_channels": 3.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"critic/ranking": 0.99, "critic/logit_gap": 5.0}, "the critic has won"),
        ({"critic/ranking": 0.505, "critic/logit_gap": 0.001}, "the critic has collapsed"),
        ({"kl/active_channels": 0.0}, "the KL has collapsed"),
    ],
)
def test_a_lasting_state_is_told_once_in_words(change, words):
    watch = Watch(patience=3)
    bad = GOOD | change
    said = [watch.read(step, values) for step, values in enumerate([bad, bad, bad, bad, bad])]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0]
    assert words in said[2][0]
    assert "step 2" in said[2][0]
    # It passes, and comes back: it is told again.
    watch.read(5, GOOD)
    assert [len(watch.read(step, bad)) for step in (6, 7, 8)] == [0, 0, 1]


def test_a_good_run_is_not_warned_about():
    watch = Watch(patience=1)
    assert watch.read(0, GOOD) == []
    assert watch.read(0, {"loss/pixel": 1.0}) == []  # no critic yet


def test_the_report_repeats_the_warnings(tmp_path):
    lines = [{"step": step, "loss/pixel": 0.1, **GOOD} for step in (10, 20)]
    lines += [{"step": step, **GOOD, "critic/ranking": 0.995} for step in (30, 40, 50, 60)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    body = training_section(read_run(tmp_path)).body
    assert body.count("the critic has won") == 1
    assert "warning at step 50" in body


def test_a_kl_that_explodes_is_told():
    watch, said = Watch(), []
    for step in range(4):
        said += watch.read(step, GOOD | {"kl_channel/0": 12.0, "kl_channel/1": 5e6})
    assert len(said) == 1
    assert "the KL explodes: a latent channel carries 5e+06 nats per value" in said[0]
    assert "loss.kl_weight" in said[0]
    assert not Watch(1).read(0, GOOD | {"kl_channel/0": 20.0})  # as of public first stages
