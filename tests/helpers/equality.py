"""Helpers of `test_equality.py` that other tests share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import arguments
from recording import record
from safetensors.torch import load_file

from first_stage.config import parse_config
from first_stage.files import read_log
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder

RECORDING = Path(__file__).with_name("recording.py")


STEPS = 6


# Critic, learned distance, adaptive balance, clipping, accumulation, EMA and schedules all at work.
EVERYTHING = {
    "train.max_steps": STEPS,
    "train.batch_size": 12,
    "train.clip_norm": 0.5,
    "train.warmup_steps": 2,
    "train.decay_steps": 2,
    "train.ema_decay": 0.9,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": STEPS,
    "train.log_every": 2,
    "loss.kl_weight": 1e-3,
    "loss.adversarial.ramp_steps": 3,
    "critic.layers": 2,
    "validation.every": 3,
    "export.images": 7,
}


ONE_MICRO = 2

MOST_COLLECTIVES = 3
"""In a step, whatever the recipe: a codebook counts codes and draws vectors, the balance averages.
The gradients of both players travel beside them, in the wrappers' buckets."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run on one process: pictures, run folder and record."""
    from conftest import picture

    root = tmp_path_factory.mktemp("equality")
    (root / "images").mkdir()
    for index in range(17):  # 13 to train on: epochs end in the middle of batches
        picture(index).save(root / "images" / f"{index:02d}.png")
    record(parse_config(line(root, "one", ONE_MICRO)), root / "record-one")
    return root


def line(root: Path, name: str, micro: int, **more: object) -> list[str]:
    fields = {**EVERYTHING, "train.micro_batch_size": micro, **more}
    return arguments(root / name, root / "images", **fields)


def samples(folder: Path, world: int) -> dict[str, list]:
    """Samples of each step, over processes in their order."""
    parts = [
        json.loads((folder / f"samples-{rank}-of-{world}.json").read_text())
        for rank in range(world)
    ]
    return {step: [s for part in parts for s in part[step]] for step in parts[0]}


def furthest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def outputs(folder: Path) -> torch.Tensor:
    return seen(load_autoencoder(str(folder)))


@torch.no_grad()
def seen(model: Any) -> torch.Tensor:
    """What both halves of a model make of the same images and latents, in one row.

    Apart: a latent halfway between two codes falls to either.
    """
    stage, draw = FirstStage(model), torch.Generator().manual_seed(0)
    encoded = stage.encode(torch.rand(4, 3, 16, 16, generator=draw) * 2 - 1).latents
    decoded = stage.decode(torch.randn(encoded.shape, generator=draw))
    return torch.cat([encoded.flatten(), decoded.flatten()])


def trained_outputs(run_folder: Path) -> torch.Tensor:
    """With the weights themselves instead of their average."""
    checkpoint = run_folder / "checkpoints" / f"step-{STEPS:06d}"
    model = load_autoencoder(str(checkpoint / "ema"))
    model.load_state_dict(load_file(checkpoint / "first_stage.safetensors"))
    return seen(model)


def check_equal(root: Path, name: str, world: int, apart: float = 1e-3) -> None:
    """The record of a run on several processes against that of one.

    `apart` is how far the gradients of two runs may be from each other, each on its own way.
    """
    one, many = root / "record-one", root / f"record-{name}"
    assert samples(many, world) == samples(one, 1)
    counted = json.loads((many / f"collectives-0-of-{world}.json").read_text())
    assert all(1 <= count <= MOST_COLLECTIVES for count in counted.values())

    expected = load_file(one / "gradients-0-of-1.safetensors")
    found = load_file(many / f"gradients-0-of-{world}.safetensors")
    for step in range(STEPS):
        for player in ("first_stage", "critic"):
            target = expected[f"{step}.free.{player}"]
            assert target.any()
            # From the same weights: nothing but the order of float32 sums.
            same = found[f"{step}.{'forced' if step else 'free'}.{player}"]
            assert furthest(same, target) < 5e-6, (step, player)
            # Along its own way: Adam turns rounding in the smallest gradients into steps.
            assert furthest(found[f"{step}.free.{player}"], target) < apart, (step, player)
    for rank in range(1, world):  # and every process applies the very same gradient
        other = load_file(many / f"gradients-{rank}-of-{world}.safetensors")
        assert all(torch.equal(other[key], found[key]) for key in found)

    torch.testing.assert_close(outputs(root / name / "export"), outputs(root / "one" / "export"),
                               rtol=0, atol=1e-4)  # fmt: skip
    torch.testing.assert_close(trained_outputs(root / name), trained_outputs(root / "one"),
                               rtol=0, atol=1e-4)  # fmt: skip

    configs = [json.loads((root / n / "export" / "config.json").read_text()) for n in (name, "one")]
    for factor in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        shared, alone = (config.get(factor) or 0.0 for config in configs)  # no family has all
        assert shared == pytest.approx(alone, rel=1e-4, abs=1e-5), factor

    lines, wanted = read_log(root / name / "log.jsonl"), read_log(root / "one" / "log.jsonl")
    assert [list(values) for values in lines] == [list(values) for values in wanted]
    for values, reference_values in zip(lines, wanted, strict=True):
        for name in ("critic/real_accuracy", "critic/fake_accuracy", "critic/ranking"):
            # Counts: a logit that is 0 up to rounding falls on either side.
            count = values.pop(name, 0.0)
            assert count == pytest.approx(reference_values.pop(name, 0.0), abs=0.02)
        gaps = [
            v.get("critic/real_logit", 0.0) - v.get("critic/fake_logit", 0.0)
            for v in (values, reference_values)
        ]
        assert gaps[0] == pytest.approx(gaps[1], rel=2e-3, abs=1e-4)
        for name in ("critic/real_logit", "critic/fake_logit", "loss/adversarial"):
            # Within the hinge's margins the gradient of the critic's last bias is 1 - 1: of what
            # rounding leaves of it Adam makes whole steps, which move all logits alike: that of
            # reals and that of fakes stay as far apart.
            logit = values.pop(name, 0.0)
            assert logit == pytest.approx(reference_values.pop(name, 0.0), rel=2e-3, abs=2e-3)
        assert values == pytest.approx(reference_values, rel=2e-3, abs=1e-5)
