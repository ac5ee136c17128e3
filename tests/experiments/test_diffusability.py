"""The yardstick of diffusability: its table by hand, and a tiny run that goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import build_autoencoder
from conftest import picture
from diffusers import AutoencoderKL
from PIL import Image

from experiments.diffusability import command, crops, judge, yardstick
from experiments.diffusability.results import (
    JUDGED,
    Result,
    correlations,
    interval,
    pooled,
    table,
    values,
    verdicts,
)
from experiments.diffusability.yardstick import Cell
from experiments.objectives.experiment import Photos
from first_stage.data import Sample
from first_stage.data.sources import ListSource
from first_stage.errors import ConfigError, UserError


def result(judged: float, psnr: float = 30.0, slope: float = 0.0) -> Result:
    health = {"spectrum": {"slope": slope}, "redundancy": 0.1, "equivariance": {}}
    evaluation = {"metrics": {"psnr": {"of_mean_error": psnr}}, "latent_health": health}
    return Result(Cell(judged, None, 0.5, 1.0), evaluation)


# -- the table --------------------------------------------------------------------------------


def test_intervals_and_deviations_by_hand():
    assert interval([5.0]) is None
    # Standard deviation 1 of three: 4.303 / sqrt(3).
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    assert pooled([1.0, 2.0, 3.0], [5.0, 9.0]) == pytest.approx(((2 * 1 + 1 * 8) / 3) ** 0.5)
    assert pooled([1.0], [2.0, 3.0]) is None


def test_the_table_has_means_with_their_intervals_and_no_empty_columns():
    found = table({"none": [result(5.0), result(6.0), result(7.0)], "one": [result(2.0)]})
    head, _, none, one = found.splitlines()
    assert "judge" in head
    assert "network" not in head  # nobody has that figure
    assert none.startswith("| none | 3 | 6.00 ± 2.48 | 50.0 ± 0.0 | 30.00 ± 0.00 |")
    assert one.startswith("| one | 1 | 2.00 | 50.0 | 30.00 |")


def test_a_gain_is_more_than_two_pooled_deviations():
    none = [result(10.0), result(11.0), result(12.0)]
    better = [result(7.0, 29.5), result(8.0, 29.5), result(9.0, 29.5)]
    near = [result(9.0), result(10.0), result(11.0)]
    worse = [result(14.0), result(15.0), result(16.0)]
    lines = verdicts(
        {"none": none, "better": better, "near": near, "worse": worse, "one": [result(1.0)]}, "none"
    )
    said = {line.split(":")[0]: line for line in lines}
    assert "-27% of none's, PSNR -0.50 dB: gain, 3.0 pooled s.d." in said["better"]
    assert "no difference shown" in said["near"]
    assert "LOSS" in said["worse"]
    assert "nothing is claimed" in said["one"]
    assert verdicts({"other": none}, "none") == []


def test_correlations_are_of_ranks():
    cells = [result(d, slope=s) for d, s in ((1.0, -3.0), (2.0, -1.0), (50.0, -0.5), (60.0, 4.0))]
    (line,) = [x for x in correlations({"a": cells[:2], "b": cells[2:]}) if "slope" in x]
    assert line == f"slope and {JUDGED.title}: +1.00 over 4"
    assert values(cells, JUDGED) == [1.0, 2.0, 50.0, 60.0]


# -- a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two first stages and pictures of two classes, told apart by their brightness."""
    folder = tmp_path_factory.mktemp("diffusability")
    for seed in (0, 1):
        torch.manual_seed(seed)
        build_autoencoder(3, 4, (8, 16), 1, 4, False, True, 16).save_pretrained(
            folder / f"stages/{'ab'[seed]}"
        )
    for number in range(24):
        path = folder / f"images/{number % 2}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        dark = picture(number, 16, 16).point(lambda v, n=number: v // 3 if n % 2 else v // 3 + 160)
        dark.save(path)
    return folder


def line(made: Path, output: Path, *more: object) -> list[str]:
    fields = {
        "data.path": made / "images", "data.resolution": 16, "output": output, "network": "null",
        "budget.steps": 3, "budget.batch_size": 4, "budget.layers": 1, "budget.heads": 1,
        "budget.samples": 6, "budget.inference_steps": 2, "baseline": "a",
    }  # fmt: skip
    flags = [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
    return [*flags, "--first_stage", f"{made}/stages/a", f"{made}/stages/b", *map(str, more)]


def test_first_stages_are_compared_and_what_is_finished_is_kept(made, tmp_path, monkeypatch):
    monkeypatch.setattr(judge.trained_judge, "__defaults__", (30,))
    command.main(line(made, tmp_path, "--seeds", 0))
    before = json.loads((tmp_path / "table.json").read_text())
    assert set(before) == {"a", "b"}
    assert all(
        cell["judge_distance"] > 0 for (found,) in before.values() for cell in [found["cell"]]
    )
    assert (tmp_path / "samples.png").is_file()

    called = []
    make = yardstick.Yardstick._make

    def counted(self, stage, first_stage, folder, seed):
        called.append((folder.parent.name, seed))
        return make(self, stage, first_stage, folder, seed)

    monkeypatch.setattr(yardstick.Yardstick, "_make", counted)
    command.main(line(made, tmp_path, "--seeds", 0, 1))
    assert called == [("a", 1), ("b", 1)]
    after = json.loads((tmp_path / "table.json").read_text())
    assert [after[n][0]["cell"] for n in "ab"] == [before[n][0]["cell"] for n in "ab"]
    assert "| a | 2 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="another first stage, budget or images"):
        command.main([*line(made, tmp_path), "--budget.steps", "4"])


def test_the_same_seed_gives_the_same_samples(made, tmp_path, monkeypatch):
    monkeypatch.setattr(judge.trained_judge, "__defaults__", (5,))
    for name in ("one", "two"):
        command.main(line(made, tmp_path / name))
    one, two = (json.loads((tmp_path / n / "table.json").read_text()) for n in ("one", "two"))
    for name in ("a", "b"):
        assert one[name][0]["cell"]["judge_distance"] == two[name][0]["cell"]["judge_distance"]


def test_what_is_held_against_samples_is_of_every_class(made, tmp_path, monkeypatch):
    """Folders list class after class: the first images would all be of one."""
    monkeypatch.setattr(judge.trained_judge, "__defaults__", (1,))
    seen = []
    monkeypatch.setattr(
        yardstick, "reconstruct", lambda stage, x: (seen.append(x.mean((1, 2, 3))), (x, None))[1]
    )
    command.main(line(made, tmp_path))
    for brightness in seen:  # one class is dark, the other bright
        assert 0 < (brightness > 0).float().mean() < 1


def test_without_labels_the_evaluation_network_looks(made, tmp_path):
    command.main([*line(made, tmp_path), "--label", "null", "--network", "efficientnet_lite0"])
    (cell,), _ = json.loads((tmp_path / "table.json").read_text()).values()
    assert cell["cell"]["judge_distance"] is None
    assert cell["cell"]["network_distance"] > 0
    assert "Fréchet distance, network" in (tmp_path / "table.md").read_text()
    (kept,) = tmp_path.glob("shared/*/efficientnet_lite0.safetensors")
    before = kept.stat().st_mtime_ns
    command.main(
        [
            *line(made, tmp_path),
            "--label",
            "null",
            "--network",
            "efficientnet_lite0",
            "--seeds",
            "1",
        ]
    )
    assert kept.stat().st_mtime_ns == before


def test_a_whitened_setting_is_trained_once(made, tmp_path, monkeypatch):
    """It is the first stage of the same changes without it, with white latents."""
    trained = []

    def train(config):
        trained.append(config.output_dir)
        folder = Path(config.output_dir) / "export"
        torch.manual_seed(0)
        build_autoencoder(3, 4, (8, 16), 1, 4, False, True, 16).save_pretrained(folder)

    monkeypatch.setattr(command, "train", train)
    file = tmp_path / "settings.yaml"
    file.write_text("none: {}\nwhitening: {whiten: true}\n")
    options = command.parse_options(
        [*line(made, tmp_path / "out")[:-3], "--settings", "none", "--settings_file", str(file)]
    )
    plain, white = (command._trained(options, name, 0) for name in ("none", "whitening"))
    assert command._trained(options, "whitening", 0) == white
    assert trained == [str(Path(plain).parent)]
    one, other = (AutoencoderKL.from_pretrained(folder) for folder in (plain, white))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(other(images).sample, one(images).sample, atol=1e-4, rtol=0)
    assert not torch.equal(one.quant_conv.weight, other.quant_conv.weight)


def test_the_judge_learns_to_read_and_is_kept(tmp_path):
    images = torch.cat([torch.full((20, 1, 16, 16), v) for v in (-0.8, 0.8)])
    images = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2).repeat_interleave(20)
    network = judge.trained_judge(tmp_path / "judge.safetensors", images, labels, 60)
    features, read = network.look(images)
    assert torch.equal(read, labels)
    kept = judge.trained_judge(tmp_path / "judge.safetensors", images, labels, 60)
    assert torch.equal(kept.look(images)[0], features)


@pytest.mark.parametrize(("more", "words"), [
    (["--seeds", "x"], "--seeds has 'x'"),
    (["--settings", "unheard_of"], "names 'unheard_of'"),
    (["--label", "null"], "samples could not be held against anything"),
    (["--settings", "none", "--changes", "train.max_steps"], "write field=value"),
])  # fmt: skip
def test_what_cannot_work_is_said_in_one_line(made, tmp_path, more, words):
    with pytest.raises(ConfigError) as caught:
        command.main(line(made, tmp_path, *more))
    assert words in str(caught.value)


def test_crops_of_photos_are_files_to_train_and_to_measure_on(tmp_path):
    draw = np.random.default_rng(0)
    arrays = [draw.integers(0, 256, (size, 90, 3), dtype=np.uint8) for size in (64, 80)]
    samples = [Sample(str(n), Image.fromarray(pixels)) for n, pixels in enumerate(arrays)]
    held_out = torch.from_numpy(arrays[0][None, :, :64]).permute(0, 3, 1, 2) / 127.5 - 1
    photos = Photos(ListSource("photos", samples), held_out, ["0"])
    for folder in (tmp_path / "once", tmp_path / "again"):
        crops.write_crops(photos, folder)
    names = sorted(file.name for file in (tmp_path / "once/training").iterdir())
    assert len(names) == len(set(names)) == 2 * crops.EACH
    seen = set()
    for name in names:
        with Image.open(tmp_path / "once/training" / name) as image:
            part = np.asarray(image)
        whole = arrays[int(name.split("-")[0])]
        windows = np.lib.stride_tricks.sliding_window_view(whole, (64, 64), (0, 1))
        assert (windows == part.transpose(2, 0, 1)).all((2, 3, 4)).any()  # it is a part of it
        seen.add(part.tobytes())
        assert (tmp_path / "again/training" / name).read_bytes() == (
            tmp_path / "once/training" / name
        ).read_bytes()
    assert len(seen) > crops.EACH  # not one place again and again
    with Image.open(tmp_path / "once/held_out/0000.png") as image:
        assert (np.asarray(image) == arrays[0][:, :64]).all()


@pytest.mark.parametrize("recipe", ["digits.yaml", "photos.yaml"])
def test_every_setting_is_a_recipe(recipe):
    """What settings.yaml changes, the recipe has."""
    recipe = str(Path(command.__file__).with_name(recipe))
    options = command.parse_options(["--settings", "none", "--recipe", recipe])
    for changes in command._settings(options).values():
        changes = {name: value for name, value in changes.items() if name not in command.AFTERWARDS}
        fields = [str(part) for name, value in changes.items() for part in (f"--{name}", value)]
        command.parse_config(["--config", options.recipe, *fields])
