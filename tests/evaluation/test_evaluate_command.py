import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from autoencoders import pictures_in, tiny_dc, tiny_kl, tiny_taesd, tiny_vq
from conftest import ROOT
from diffusers import UNet2DModel
from launching import run as launch

from first_stage.commands.evaluate import main, parse, short_names
from first_stage.errors import UserError


def run(*line: object, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """The script as users start it: alone, or by `torchrun` on several processes."""
    command = [sys.executable]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    env["OMP_NUM_THREADS"] = "1"
    if processes is not None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [*launcher, str(processes)]
    return subprocess.run(
        [*command, "scripts/evaluate.py", *map(str, line)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.fixture
def stages(tmp_path) -> Path:
    folder = tmp_path / "stages"
    tiny_kl().save_pretrained(folder / "kl" / "export")
    tiny_vq().save_pretrained(folder / "vq")
    tiny_taesd().save_pretrained(folder / "taesd")
    tiny_dc().save_pretrained(folder / "dc")
    return folder


def test_side_by_side(stages, tmp_path, capsys) -> None:
    data, output = pictures_in(tmp_path, 5), tmp_path / "out"
    names = [str(stages / name) for name in ("kl/export", "vq", "taesd", "dc")]
    line = ["--first_stage", *names, "--data.path", str(data), "--output", str(output)]
    main([*line, "--features", "none", "--data.workers", "0", "--pairs", "2"])
    printed = capsys.readouterr().out
    assert printed.startswith("1 process(es) on cpu")
    assert "5 of 5 images" in printed
    assert "kl/export" in printed
    assert "PSNR ↑" in printed
    assert printed.rstrip().splitlines()[-1].startswith(f"look at {output / 'report.html'}")
    content = json.loads((output / "metrics.json").read_text())
    assert [s["class"] for s in content["first_stages"]] == [
        "AutoencoderKL", "VQModel", "AutoencoderTiny", "AutoencoderDC",
    ]  # fmt: skip
    assert [s["source"] for s in content["first_stages"]] == names
    assert (output / "report.html").is_file()
    # A second evaluation does not silently replace the first.
    with pytest.raises(UserError, match=r"already holds metrics.json.*--overwrite true"):
        main(line)
    main([*line, "--overwrite", "true", "--features", "none", "--data.workers", "0"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([], "--first_stage is missing"),
        (["--first_stage", "a", "a", "--data.path", "photos", "--output", "o"], "twice"),
        (["--first_stage", "a", "--output", "o"], "--data.path is missing"),
        (["--first_stage", "a", "--data.path", "photos"], "--output is missing"),
        (["--first_stage", "a", "--data.path", "photos", "--output", "o", "--num_images", "0"],
         "num_images is 0; it must be an int above 0 or null"),
        (["--first_stage", "a", "--data.path", "photos", "--output", "o", "--data.split", "test"],
         "photos has train, validation and all"),
        (["--first_stage", "a", "--data.path", "photos", "--output", "o", "--data.resize", "64"],
         "without --data.resolution"),
        (["--first_stage", "a", "--data.path", "photos", "--output", "o", "--seeed", "1"], "seeed"),
        (["--first_stage", "a", "--data.path", "photos", "--output", "o", "--seed", "x"], "seed"),
    ],
)  # fmt: skip
def test_bad_arguments_are_told_in_one_line(line, words) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse(line)
    assert "\n" not in str(error.value)


def test_bad_input_is_told_in_one_line(stages, tmp_path) -> None:
    data = pictures_in(tmp_path, 2)
    unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    for stage, path, words in [
        (tmp_path / "unet", data, "is not an autoencoder"),
        (tmp_path / "nowhere", data, "does not exist"),
        (stages / "kl/export", stages / "vq", "holds no images"),
    ]:
        arguments = ["--first_stage", stage, "--data.path", path, "--output", tmp_path / "out"]
        with pytest.raises(UserError, match=words) as error:
            main([*map(str, arguments), "--features", "none"])
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out" / "metrics.json").exists()


def test_every_name_is_checked_before_the_first_is_measured(stages, tmp_path, monkeypatch) -> None:
    tiny_kl(in_channels=1).save_pretrained(stages / "gray")
    tiny_kl().save_pretrained(stages / "torn")
    weights = stages / "torn" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    measured = []
    monkeypatch.setattr("first_stage.commands.evaluate.evaluate", measured.append)
    data = ["--data.path", str(pictures_in(tmp_path, 2)), "--features", "none"]
    for last, words in (
        ("nowhere", "does not exist"),
        ("torn", "cannot be loaded"),
        ("gray", "takes images of 1 channels, but .* of 3: evaluate them separately"),
    ):
        names = [str(stages / name) for name in ("kl/export", "vq", last)]
        line = ["--first_stage", *names, *data, "--output", str(tmp_path / "out")]
        with pytest.raises(UserError, match=rf"--first_stage .*{last}.*{words}"):
            main(line)
    assert not measured


def test_the_script_ends_with_one_line_and_code_2(stages, tmp_path) -> None:
    ended = run(
        *("--first_stage", tmp_path / "nowhere", "--data.path", pictures_in(tmp_path, 1)),
        *("--output", tmp_path / "out", "--features", "none"),
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "nowhere' does not exist" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_output_that_cannot_be_written(stages, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        main(["--first_stage", str(stages / "vq"), "--data.path", "photos",
              "--output", str(tmp_path / "file" / "out"), "--features", "none"])  # fmt: skip


def test_short_names_tell_first_stages_apart() -> None:
    assert short_names(["runs/demo/export"]) == ["demo/export"]
    assert short_names(["runs/a/export", "runs/b/export"]) == ["a/export", "b/export"]
    assert short_names(["x/a/export", "y/a/export"]) == ["x/a/export", "y/a/export"]
    assert short_names(["stabilityai/sd-vae-ft-mse", "runs/mine"]) == ["sd-vae-ft-mse", "mine"]
    assert short_names(["a", "x/a"]) == ["a", "x/a"]


def assert_same(a: object, b: object, path: str = "") -> None:
    """Equal structure; numbers to 1e-6, absolutely or relatively."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{k}")
    elif isinstance(a, float):
        assert math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6), (path, a, b)
    else:
        assert a == b, path


@pytest.mark.slow
def test_processes_do_not_change_the_result(stages, tmp_path) -> None:
    data = pictures_in(tmp_path, 101)
    (data / "050.png").write_bytes(b"no image")  # the 102nd file: 101 can be decoded
    found = {}
    for processes in (1, 2, 3):
        output = tmp_path / f"out-{processes}"
        ended = run(
            *("--first_stage", stages / "kl/export", "--data.path", data),
            *("--output", output, "--batch_size", 4, "--data.workers", 0, "--pairs", 3),
            processes=processes,
        )
        assert ended.returncode == 0, ended.stderr
        assert f"{processes} process(es) on cpu" in ended.stdout
        found[processes] = json.loads((output / "metrics.json").read_text())
    for stage in found[1]["first_stages"]:
        assert len(stage["per_image"]) == 101
        assert len({row["id"] for row in stage["per_image"]}) == 101
        assert list(stage["unreadable"]) == ["050.png"]
        distance = stage["features"]["FD-EfficientNet-Lite0"]
        assert distance["frechet_distance"] > 0
        assert "101 images" in distance["note"]
    assert_same(found[1], found[2])
    assert_same(found[1], found[3])


@pytest.mark.slow
def test_two_processes_find_the_same_before_and_after(stages, tmp_path) -> None:
    data = pictures_in(tmp_path, 17)
    after = tiny_kl()
    with torch.no_grad():
        for parameter in after.decoder.parameters():
            parameter.mul_(1.1)
    after.save_pretrained(tmp_path / "after")
    found = {}
    for processes in (1, 2):
        output = tmp_path / f"out-{processes}"
        line = ["--first_stage", tmp_path / "after", "--before", stages / "kl/export"]
        line += ["--data.path", data, "--output", output, "--features", "none"]
        line += ["--batch_size", 4, "--data.workers", 0]
        text = launch(processes, ROOT / "scripts/evaluate.py", *line, output=tmp_path / "text")
        assert f"{processes} process(es) on cpu" in text
        assert "Latents are the same bit for bit" in text
        found[processes] = json.loads((output / "metrics.json").read_text())
    assert len(found[1]["change"]["per_image"]) == 17
    assert found[1]["change"]["worst"]
    assert_same(found[1], found[2])


def test_own_seed_of_torch_changes_nothing(stages, tmp_path) -> None:
    data = pictures_in(tmp_path, 3)
    contents = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        output = tmp_path / str(seed)
        main(["--first_stage", str(stages / "kl/export"), "--data.path", str(data), "--features",
              "none", "--data.workers", "0", "--output", str(output)])  # fmt: skip
        contents.append((output / "metrics.json").read_text())
    assert contents[0] == contents[1]
