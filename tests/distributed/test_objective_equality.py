"""One process or two with every option of the objective at work: the same gradients."""

from pathlib import Path

import pytest
from conftest import picture
from equality import RECORDING, check_equal, line
from launching import run
from recording import record

from first_stage.config import parse_config

MIXES = {
    "wasserstein": {
        "loss.adversarial.kind": "wasserstein",
        "loss.adversarial.gradient_penalty": 10,
        "loss.adversarial.lecam": 0.1,
        "loss.adversarial.prior_samples": "true",
        "loss.learned.ema_decay": 0.9,
        "loss.learned_logvar": "true",
        "loss.pixel": "huber",
        "loss.free_bits": 0.01,
        "critic.norm": "spectral",
    },
    "relativistic": {
        "loss.adversarial.kind": "relativistic",
        "loss.adversarial.r1": 1,
        "loss.adversarial.r2": 1,
        "loss.adversarial.penalty_every": 2,
        "loss.adversarial.reaches_encoder": "false",
        "loss.balance.kind": "shares",
        "loss.balance.shares": "{pixel: 0.5, learned: 0.3, adversarial: 0.2}",
        "critic.antialias": "true",
        "critic.layers": 1,
        "critic.scales": 2,
    },
    "disturbed": {
        "disturb.equivariance.probability": 0.7,
        "disturb.equivariance.transforms": "[scale,flip,turn]",
        "disturb.equivariance.least_scale": 0.75,
        "disturb.noise.probability": 0.5,
        "disturb.prefix.probability": 0.5,
        "disturb.prefix.channels": 1,
        "loss.adversarial.prior_samples": "true",
        "loss.variance.weight": 0.1,
        "loss.spectrum.weight": 0.1,
    },
    "views that vary, crops that grow": {
        "data.resize": 0,
        "data.least_scale": 0.7,
        "data.jitter_saturation": 0.5,
        "data.jitter_hue": 0.2,
        "data.late_resolution": 20,
        "data.late_steps": 3,
        "disturb.noise.probability": 0.5,
        "loss.adversarial.prior_samples": "true",
        "model.initialization": "quiet",
    },
    "decoder alone after three steps": {
        "train.encoder_steps": 3,
        "loss.pixel": "l2",
        "loss.pixel_cutoff": 0.2,
        "loss.adversarial.reaches_encoder": "false",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_two_processes_train_what_one_does(tmp_path: Path, mix: str):
    (tmp_path / "images").mkdir()
    for index in range(17):
        picture(index).save(tmp_path / "images" / f"{index:02d}.png")
    record(parse_config(line(tmp_path, "one", 2, **MIXES[mix])), tmp_path / "record-one")
    text = run(
        *(2, RECORDING, tmp_path / "record-two", tmp_path / "one"),
        *line(tmp_path, "two", 3, **MIXES[mix]),
        output=tmp_path / "two.txt",
    )
    assert "2 processes on cpu" in text
    check_equal(tmp_path, "two", 2)
