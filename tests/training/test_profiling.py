"""`train.profile_steps`: a trace with named spans, of the steps that were asked for."""

import json

import pytest
import torch

from first_stage.errors import ConfigError
from first_stage.seeding import Purpose, generator
from first_stage.training.draws import normals, uniforms
from first_stage.training.loop import train

SPANS = (
    "data", "first stage", "critic", "losses", "balance", "backward", "critic losses",
    "critic backward", "update",
)  # fmt: skip


def test_the_trace_has_a_span_for_every_part_of_the_recorded_steps(tiny, tmp_path):
    train(tiny(train__profile_steps="[1, 3]", train__max_steps=4))
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    for span in SPANS:
        assert names.count(f"first-stage: {span}") == 2, span  # steps 1 and 2
    table = (tmp_path / "run/profile/table.txt").read_text()
    assert "first-stage: backward" in table


def test_what_is_left_of_the_range_is_written_when_the_run_ends(tiny, tmp_path):
    train(tiny(train__profile_steps="[3, 50]", train__max_steps=4))
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    assert names.count("first-stage: update") == 1


def test_a_recorded_run_trains_the_same(tiny, tmp_path):
    from safetensors.torch import load_file

    for name, steps in (("plain", None), ("recorded", "[0, 2]")):
        train(tiny(output_dir=tmp_path / name, train__profile_steps=steps))
    plain, recorded = (
        load_file(tmp_path / name / "export/diffusion_pytorch_model.safetensors")
        for name in ("plain", "recorded")
    )
    assert all(torch.equal(plain[key], recorded[key]) for key in plain)


def test_a_range_that_is_none_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"train.profile_steps is \[3, 3\]"):
        tiny(train__profile_steps="[3, 3]")


def test_draws_are_functions_of_seed_purpose_and_position():
    together = normals(7, Purpose.NOISE, [3, 5, 8], (2, 2))
    alone = generator(7, Purpose.NOISE, 5).standard_normal((2, 2), dtype="float32")
    assert torch.equal(together[1], torch.from_numpy(alone))
    assert not torch.equal(together, normals(7, Purpose.PRIOR, [3, 5, 8], (2, 2)))
    values = uniforms(7, Purpose.MIX, [3, 5])
    assert torch.equal(values[1:], uniforms(7, Purpose.MIX, [5]))
    assert ((values >= 0) & (values < 1)).all()
