"""Codebooks and grids on one process or many: the same codes, restarts, usage and gradients."""

from pathlib import Path

import pytest
import torch
from conftest import picture
from equality import RECORDING, STEPS, check_equal, line
from launching import run
from recording import record
from safetensors.torch import load_file

from first_stage.config import parse_config

KINDS = {
    "euclidean": {"model.family": "vq", "model.vq.codes": 48, "model.vq.restart_after": 1},
    "cosine": {"model.family": "vq", "model.vq.codes": 48, "model.vq.restart_after": 1,
               "model.vq.rule": "cosine", "model.vq.gradient": "rotation"},
    "linear": {"model.family": "vq", "model.vq.codes": 48, "model.vq.rule": "linear"},
    "fsq": {"model.family": "fsq", "model.fsq.levels": "[5,4,3]",
            "loss.adversarial.reaches_encoder": "false"},
    "decoder alone": {"model.family": "vq", "model.vq.codes": 48, "model.vq.restart_after": 1,
                      "train.encoder_steps": 3},
}  # fmt: skip


SLOWLY = {"train.learning_rate": 1e-4}
"""Adam turns rounding in the smallest gradients into steps, and codes turn those into jumps."""


def bottleneck(run_folder: Path, which: str) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "checkpoints" / f"step-{STEPS:06d}" / f"{which}.safetensors")


@pytest.mark.parametrize(
    ("kind", "world", "micro"),
    [
        ("euclidean", 2, 3),
        *(pytest.param(kind, 2, 3, marks=pytest.mark.slow) for kind in list(KINDS)[1:]),
        pytest.param("euclidean", 3, 2, marks=pytest.mark.slow),
        pytest.param("euclidean", 4, 1, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_the_codes_that_one_does(tmp_path, kind, world, micro):
    (tmp_path / "images").mkdir()
    for index in range(17):
        picture(index).save(tmp_path / "images" / f"{index:02d}.png")
    fields = {**SLOWLY, **KINDS[kind]}
    record(parse_config(line(tmp_path, "one", 2, **fields)), tmp_path / "record-one")
    run(
        *(world, RECORDING, tmp_path / "record-many", tmp_path / "one"),
        *line(tmp_path, "many", micro, **fields),
        output=tmp_path / "many.txt",
    )
    # A latent halfway between two codes, or a patch on the hinge, falls to either side.
    check_equal(tmp_path, "many", world, apart=0.05)
    expected, found = (bottleneck(tmp_path / name, "bottleneck") for name in ("one", "many"))
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    if "restart_after" in str(KINDS[kind]):
        averages = [bottleneck(tmp_path / n, "bottleneck_ema") for n in ("one", "many")]
        torch.testing.assert_close(averages[1], averages[0], rtol=1e-4, atol=1e-5)
