"""The commands as users start them: exit codes, one-line errors, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT, arguments, picture, run_script


def test_train_through_accelerate_launch(images, tmp_path):
    result = run_script(
        *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "scripts/train.py"),
        *arguments(tmp_path / "run", images, data__workers=1),
    )
    assert result.returncode == 0, result.stderr
    assert "1 process on cpu" in result.stdout
    for promised in ("export", "grid", "gif", "report"):
        line = next(text for text in result.stdout.splitlines() if text.startswith(promised))
        assert os.path.exists(line.split()[1]), line
    assert "AutoencoderKL.from_pretrained" in result.stdout
    assert "img/s" in result.stderr
    assert "waiting for data" in result.stderr


def bad_inputs(tmp_path, images):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("loss:\n  kl_wieght: 1\n")
    full = tmp_path / "full"
    full.mkdir()
    (full / "log.jsonl").touch()
    rubbish = tmp_path / "rubbish"
    rubbish.mkdir()
    for index in range(4):
        (rubbish / f"{index}.png").write_bytes(b"rubbish")
    run = tmp_path / "run"
    return {
        "a folder without images": (
            arguments(run, tmp_path / "empty"),
            "holds no images",
        ),
        "a resolution off the factor": (
            arguments(run, images, data__resolution=17),
            "data.resolution (17) is not a multiple of the downsample factor (2): use 16 or 18",
        ),
        "a recipe that is none": (["--config", "kl_f9"], "is neither a file nor a recipe; the rec"),
        "a misspelt flag": ([*arguments(run, images), "--loss.kl_wieght", "1"], "kl_wieght"),
        "a misspelt key": (
            ["--config", str(tmp_path / "broken.yaml"), *arguments(run, images)],
            "kl_wieght",
        ),
        "a folder that holds a run": (arguments(full, images), "already holds a run"),
        "nothing but broken files": (arguments(run, rubbish), "decoded"),
        "a tracker that is not known": (
            arguments(run, images, train__tracker="abacus"),
            "train.tracker is 'abacus'",
        ),
        "a checkpoint that is none": (
            arguments(run, images, resume=str(tmp_path / "empty")),
            "is not a checkpoint",
        ),
    }


def test_bad_input_is_one_line_and_exit_code_2(images, tmp_path):
    cases = bad_inputs(tmp_path, images)
    # One process for all of them: each start-up costs seconds.
    program = (
        "import json, sys\n"
        "from first_stage.errors import run_command\n"
        "from first_stage.commands import train\n"
        "for line in json.load(sys.stdin):\n"
        "    sys.argv = ['first-stage train', *line]\n"
        "    try:\n"
        "        run_command(train.main)\n"
        "    except SystemExit as end:\n"
        "        print('exit', end.code, file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([line for line, _ in cases.values()]),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = result.stderr.splitlines()
    assert len(lines) == 2 * len(cases), result.stderr
    for (name, (_, words)), said, end in zip(cases.items(), lines[::2], lines[1::2], strict=True):
        assert said.startswith("error: "), name
        assert words in said, name
        assert end == "exit 2", name


def test_one_bad_input_through_a_real_process(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run_script("scripts/train.py", *arguments(tmp_path / "run", tmp_path / "empty"))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_control_c_saves_and_says_how_to_go_on(images, tmp_path):
    for index in range(20, 30):
        picture(index).save(images / f"{index}.png")
    line = arguments(tmp_path / "run", images, train__max_steps=100000)
    process = subprocess.Popen(
        [sys.executable, "scripts/train.py", *line],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run/log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size > 2000):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "everything is saved" in out
    assert "--resume latest" in out
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1
