"""The token example: it learns, samples what it learned, and says what a judge reads."""

import importlib.util
import itertools
import json
import sys

import pytest
import torch
from conftest import ROOT, arguments

from first_stage.commands import cache as cache_command
from first_stage.config import parse_config
from first_stage.training.loop import train

SCRIPT = ROOT / "examples" / "tokens" / "train_tokens.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tokens", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tokens"] = module
    spec.loader.exec_module(module)
    return module


class TwoImages:
    """A data set of two images, one of each class."""

    images = torch.tensor([[[0, 1], [2, 3]], [[3, 3], [1, 0]]])

    def __len__(self):
        return 64

    def __getitems__(self, indices):
        return [{"tokens": self.images[i % 2], "label": i % 2} for i in indices]


def test_it_learns_and_samples_the_images_of_a_class(script):
    options = script.Options(steps=400, batch_size=32, width=32, layers=2, passes=3)
    torch.manual_seed(0)
    model = script.MaskedTransformer(4, 4, script.CLASSES, 32, 2)
    script.train(model, TwoImages(), options)
    labels = torch.tensor([0, 1, 1, 0])
    found = script.sample(model, labels, options)
    assert torch.equal(found, TwoImages.images[labels].flatten(1))
    assert torch.equal(found, script.sample(model, labels, options))  # a function of the seed


def test_sampling_hides_fewer_tokens_in_every_pass_and_none_at_the_end(script):
    model = script.MaskedTransformer(5, 16, script.CLASSES, 32, 1)
    seen = []
    forward = model.forward
    model.forward = lambda tokens, labels: (seen.append(tokens.clone()), forward(tokens, labels))[1]
    options = script.Options(passes=6, guidance_scale=1.0)
    found = script.sample(model, torch.tensor([0, 1, 2]), options)
    hidden = [(tokens == 5).sum(1) for tokens in [*seen, found]]
    assert (hidden[0] == 16).all()
    assert (hidden[-1] == 0).all()
    for earlier, later in itertools.pairwise(hidden):
        assert (later < earlier).all()
    for earlier, later in zip(seen, [*seen[1:], found], strict=True):
        named = earlier != 5
        assert torch.equal(earlier[named], later[named])  # what is named stays


@pytest.mark.slow
def test_from_digits_to_a_score(script, tmp_path, monkeypatch):
    """Every part with hardly any training: the files are there, and the numbers are numbers."""
    fields = {"model.family": "vq", "model.in_channels": 1, "model.vq.codes": 16,
              "data.resolution": 32, "data.flip": "false"}  # fmt: skip
    train(parse_config(arguments(tmp_path / "run", "digits", **fields)))
    cache_command.main([
        "--first_stage", str(tmp_path / "run/export"), "--data.path", "digits",
        "--output", str(tmp_path / "tokens"), "--representation", "tokens",
    ])  # fmt: skip
    monkeypatch.setattr(sys, "argv", [
        "train_tokens.py", "--tokens", str(tmp_path / "tokens"), "--output_dir",
        str(tmp_path / "out"), "--steps", "2", "--batch_size", "4", "--width", "32", "--layers",
        "1", "--samples", "10", "--passes", "2",
    ])  # fmt: skip
    script.main()
    found = json.loads((tmp_path / "out/score.json").read_text())
    assert found["judge_on_real_digits"] > 0.9
    assert 0 <= found["read_as_asked"] <= 1
    assert (tmp_path / "out/digits.png").exists()
    assert (tmp_path / "out/transformer/model.safetensors").exists()
