"""A decoder fine-tuned on a foreign domain: old latents stay good, and what was trained on them."""

import json
from pathlib import Path

import pytest
import yaml

from experiments.finetune import command
from experiments.finetune.measure import Found, Samples
from experiments.finetune.results import table


def found(**changes) -> Found:
    drift = {"exact": True, "largest": 0.0}
    gain = {"mean": 2.0, "half_interval": 0.1, "improved": 0.9}
    fields = {
        "encoder_unchanged": True, "drift": drift, "psnr": (20.0, 22.0), "gain": gain,
        "cache_accepted": True, "reconstructions": (3.0, 1.0), "judge_accuracy": 0.97,
        "before": [Samples(4.0, None, 0.5), Samples(6.0, None, 0.7)],
        "after": [Samples(2.0, None, 0.8)],
    }  # fmt: skip
    return Found(**{**fields, **changes})


def test_the_table_holds_both_decoders_with_intervals_over_seeds():
    lines = table(found()).splitlines()
    assert "| held-out PSNR (dB) | 20.00 | 22.00 |" in lines
    # Standard deviation sqrt(2) of two: 12.706 * sqrt(2) / sqrt(2).
    assert "| **of samples** | 5.00 ± 12.71 | 2.00 |" in lines
    assert "| samples read as asked (%) | 60.0 ± 127.1 | 80.0 |" in lines
    assert lines[-1].startswith("Encoder unchanged, drift of the latents 0, old cache accepted")
    assert "CHANGED" in table(found(encoder_unchanged=False))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_diffusion_model_of_the_old_latents_decodes_better_with_the_new_decoder(tmp_path):
    """The experiment at 16 x 16: photos, then digits, and a transformer in between."""
    recipes = {}
    for name, steps in (("photos", 200), ("digits", 200)):
        recipe = yaml.safe_load(Path(f"experiments/finetune/{name}.yaml").read_text())
        recipe["data"]["resolution"] = 16
        recipe["train"] |= {"max_steps": steps, "decay_steps": 100, "checkpoint_every": steps}
        recipe["validation"] = {"every": steps, "images": 20, "pictures": 2}
        recipe["export"]["images"] = 100
        if name == "photos":
            recipe["data"] |= {"resize": 64}
            recipe["model"] |= {"block_out_channels": [16, 32], "norm_num_groups": 8}
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(yaml.safe_dump(recipe))
    line = ["--output", tmp_path / "out", "--photos", recipes["photos"], "--recipe",
            recipes["digits"], "--seeds", 0, "--budget.steps", 150, "--budget.layers", 2,
            "--budget.samples", 150, "--budget.inference_steps", 10]  # fmt: skip
    command.main(list(map(str, line)))
    numbers = json.loads((tmp_path / "out/table.json").read_text())
    assert numbers["encoder_unchanged"]
    assert numbers["drift"]["exact"]
    assert numbers["cache_accepted"]
    assert numbers["gain"]["mean"] > 1
    (before,), (after,) = numbers["before"], numbers["after"]
    assert after["distance"] < 0.9 * before["distance"]
    assert (tmp_path / "out/samples.png").is_file()
