"""What only a GPU can show: `pytest -m gpu`, which `make gpu` runs. Skipped where there is none."""

import copy

import pytest
import torch
from stepping import assert_close, batch_of, gradients_of, make_trainer

from first_stage.metrics.precision import full_float32
from first_stage.models.quantizers import nearest
from first_stage.training.step import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here"),
]

CUDA = torch.device("cuda")
KINDS = {
    "gaussian": {"loss__adversarial__prior_samples": True, "loss__adversarial__r1": 0.1},
    "codes": {"model__family": "vq", "model__vq__codes": 24, "model__vq__restart_after": 1},
    "grid": {"model__family": "fsq", "model__fsq__levels": "[5,4,3]"},
}


def batches(trainer: Trainer, step: int):
    return [batch_of(trainer, 2, 2 * step + n).to(trainer.accelerator.device) for n in range(2)]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_gpu(tiny, kind, precision):
    trainer = make_trainer(tiny(train__max_steps=9, train__precision=precision, **KINDS[kind]))
    assert trainer.accelerator.device.type == "cuda"
    for step in range(4):
        trainer.training_step(step, batches(trainer, step))
    there = batches(trainer, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(4, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.meter.first_bad(trainer.processes.minimum) is None


def test_the_gpu_computes_the_gradient_that_the_cpu_does(tiny, monkeypatch):
    with full_float32():
        there = make_trainer(tiny())
        found = gradients_of(there, 0, batches(there, 0))
        monkeypatch.setattr(type(there.accelerator), "device", torch.device("cpu"))
        here = make_trainer(tiny())
        expected = gradients_of(here, 0, batches(here, 0))
    on_cpu = {name: [g.cpu() for g in gradients] for name, gradients in found.items()}
    assert_close(on_cpu, expected, rtol=1e-3)


def test_the_nearest_codes_do_not_depend_on_tensor_float_32():
    draw = torch.Generator().manual_seed(0)
    vectors, codes = (torch.randn(n, 8, generator=draw) for n in (4000, 500))
    torch.set_float32_matmul_precision("high")
    try:
        found = nearest(vectors.to(CUDA), codes.to(CUDA)).cpu()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (found == nearest(vectors, codes)).float().mean() > 0.999


def test_float16_survives_a_step_that_overflows(tiny):
    trainer = make_trainer(tiny(train__precision="fp16"))
    trainer.training_step(0, batches(trainer, 0))
    before = [p.detach().clone() for p in trainer.first_stage.parameters]
    trainer.accelerator.scaler.update(2.0**120)
    trainer.training_step(1, batches(trainer, 1))  # skipped: the scale is far too large
    for parameter, old in zip(trainer.first_stage.parameters, before, strict=True):
        assert torch.equal(parameter, old)
    assert trainer.accelerator.scaler.get_scale() < 2.0**120


def test_eight_bit_states_go_on_from_a_checkpoint(tiny):
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(tiny(train__optimizer="adamw_8bit"))
    for step in range(2):
        trainer.training_step(step, batches(trainer, step))
    saved = copy.deepcopy(trainer.snapshot(2))
    trainer.training_step(2, batches(trainer, 2))
    expected = [p.detach().clone() for p in trainer.first_stage.parameters]
    other = make_trainer(tiny(train__optimizer="adamw_8bit"))
    other.restore(saved, copy.deepcopy(other.first_stage.network.model))
    other.training_step(2, batches(other, 2))
    for found, value in zip(other.first_stage.parameters, expected, strict=True):
        torch.testing.assert_close(found, value)
