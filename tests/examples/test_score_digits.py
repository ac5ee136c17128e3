"""The judge of sampled digits knows real ones, and says so of others only where it should."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from first_stage.errors import UserError

SCRIPT = ROOT / "examples" / "digits" / "score_digits.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("score_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["score_digits"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_judge_reads_real_digits(script):
    judge, real = script.train_judge(32)
    assert real >= 0.95
    images, labels = script.real_digits("validation", 32)
    assert judge.score(images.reshape(len(images), -1), labels) == real
    # It reads digits: mirrored ones are mostly others.
    mirrored = images[:, :, ::-1].reshape(len(images), -1)
    assert judge.score(mirrored, labels) < 0.7


def test_real_digits_are_those_of_the_first_stage(script):
    images, labels = script.real_digits("validation", 32)
    assert images.shape == (500, 32, 32)
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert set(labels) == set(range(10))


def test_samples_come_back_in_the_order_of_the_classes_asked_for(script):
    """A pipeline that paints its class's number."""
    asked = []

    def pipeline(class_labels, guidance_scale, num_inference_steps, generator):
        asked.append((tuple(class_labels), generator.initial_seed()))
        made = [Image.fromarray(np.full((4, 4), 20 * c, np.uint8)) for c in class_labels]
        return SimpleNamespace(images=made)

    pipeline.transformer = SimpleNamespace(device="cpu")
    options = script.Options(samples=30, batch_size=20, seed=7)
    pictures = script.sample(pipeline, options)
    assert pictures.shape == (30, 4, 4)
    np.testing.assert_allclose(pictures[:, 0, 0] * 255, [20 * (n % 10) for n in range(30)])
    assert [seed for _, seed in asked] == [7, 27]  # other noise in every batch


def test_a_folder_without_a_pipeline_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score_digits.py", "--pipeline", str(tmp_path)])
    with pytest.raises(UserError, match="no diffusers pipeline"):
        script.main()
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--samples", "12"])
    with pytest.raises(UserError, match="samples is 12; give a multiple of 10"):
        script.main()
