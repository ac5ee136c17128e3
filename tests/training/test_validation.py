"""Held-out images: what has no number does not reach the log."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from first_stage.data import FixedImages
from first_stage.distributed.processes import Processes
from first_stage.files import read_log
from first_stage.training import validation
from first_stage.training.log import Logbook
from first_stage.training.validation import validate


def measured(monkeypatch, exact: int, count: int = 4):
    """The metrics where so many of the images are rebuilt exactly, and the others nearly."""
    pixels = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)
    seen = [0]

    def rebuild(_, images):
        rebuilt = images.clone()
        for place in range(len(images)):
            if seen[0] + place >= exact:
                rebuilt[place] = (rebuilt[place] + 0.1).clamp(-1, 1)
        seen[0] += len(images)
        return rebuilt, SimpleNamespace(latents=None)

    monkeypatch.setattr(validation, "reconstruct", rebuild)
    stage = SimpleNamespace(device=torch.device("cpu"), bottleneck=None)
    torch.manual_seed(0)
    return validate(stage, FixedImages(pixels, [""] * count), Processes(), 3)


@pytest.mark.parametrize("exact", [0, 1, 3, 4])
def test_images_that_are_rebuilt_exactly_are_counted_apart(monkeypatch, exact):
    torch.manual_seed(0)
    found = measured(monkeypatch, exact)
    assert all(math.isfinite(value) for value in found.values())
    assert found.get("identical_images", 0) == exact
    assert ("psnr" in found) == (exact < 4)
    if exact < 4:  # the mean of those that have one
        assert 25 < found["psnr"] < 28


def test_the_log_is_json_whatever_a_run_computes(tmp_path):
    said = []
    accelerator = SimpleNamespace(log=lambda values, step: said.append(values))
    (tmp_path / "log.jsonl").write_text('{"step": 1, "validation/psnr": Infinity}\n')
    book = Logbook(tmp_path / "log.jsonl", accelerator, 1)
    book.write(2, {"a": math.nan, "b": math.inf, "c": 1.5})

    def refuse(word):
        raise AssertionError(word)

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=refuse) for line in lines]
    assert read == [
        {"step": 1, "validation/psnr": None},
        {"step": 2, "a": None, "b": None, "c": 1.5},
    ]
    assert said == [{"c": 1.5}]
    assert read_log(tmp_path / "log.jsonl") == read
