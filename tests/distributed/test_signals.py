"""Signals, kills and lost processes of real trainings."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import arguments, picture
from launching import (
    TRAIN,
    command,
    descendants,
    environment,
    finish,
    run,
    start,
    trainings,
    wait_for,
    wait_until,
)

from first_stage.training.checkpoint import list_checkpoints, load_checkpoint
from first_stage.training.log import read_log

ENDLESS = {"train.max_steps": 100000, "train.checkpoint_every": 100000, "train.batch_size": 12}


def lines_of(folder: Path) -> int:
    return len(read_log(folder / "log.jsonl"))


def begin(tmp_path, images, processes: int, **fields):
    """Start a run without end, and wait until it trains."""
    output = tmp_path / "output.txt"
    line = arguments(tmp_path / "run", images, **{**ENDLESS, **fields})
    process = start(command(processes, TRAIN, *line), output)
    wait_for(process, output, lambda: lines_of(tmp_path / "run") > 5)
    return process, output


def saved_step(folder: Path) -> int:
    ((step, checkpoint),) = list_checkpoints(folder)
    load_checkpoint(checkpoint)
    assert max(line["step"] for line in read_log(folder / "log.jsonl")) <= step
    return step


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_whole_job_saves_and_exits_with_0(tmp_path, images, number):
    """As a scheduler or a terminal sends it: to the training and to its data workers."""
    process, output = begin(tmp_path, images, 1, **{"data.workers": 1})
    os.killpg(process.pid, number)
    text = finish(process, output, 60)
    assert process.returncode == 0, text
    assert "Traceback" not in text
    step = saved_step(tmp_path / "run")
    assert f"stopped after step {step} of 100000; everything is saved. Go on with:" in text


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_printed_command_goes_on(tmp_path, images, processes):
    """Pasted into a shell as it stands, with as many processes as before."""
    process, output = begin(tmp_path, images, processes)
    os.kill(process.pid, signal.SIGTERM)
    text = finish(process, output, 60)
    step = saved_step(tmp_path / "run")
    told = re.search(r"Go on with:\n +(.*)", text)[1]
    shell = {name: value for name, value in environment().items() if name != "ACCELERATE_USE_CPU"}
    again = start(["bash", "-c", f"{told} --train.max_steps {step + 2}"], output, env=shell)
    text = finish(again, output, 90)
    assert again.returncode == 0, text
    assert f"{processes} process{'es' if processes > 1 else ''} on cpu" in text
    assert f"resuming at step {step} " in text
    assert (tmp_path / "run" / "export" / "config.json").exists()


@pytest.mark.slow
def test_ending_the_launcher_of_one_process_ends_the_training_saved(tmp_path, images):
    """It does not pass signals on; the training notices that it is gone."""
    output = tmp_path / "output.txt"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    line = arguments(tmp_path / "run", images, **ENDLESS)
    process = start([*launcher, str(TRAIN), *line], output)
    wait_for(process, output, lambda: lines_of(tmp_path / "run") > 5)
    (training,) = descendants(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    process.wait()
    wait_until(lambda: not Path(f"/proc/{training}").exists(), 30)
    assert "everything is saved" in output.read_text()
    saved_step(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("whole_job", [True, False])
def test_several_processes_stop_between_the_same_two_steps(tmp_path, images, whole_job):
    process, output = begin(tmp_path, images, 2)
    ranks = trainings(process.pid)
    assert sorted(ranks) == [0, 1]
    if whole_job:  # the launcher then sends each process the signal a second time
        os.killpg(process.pid, signal.SIGTERM)
    else:  # a signal to any one process stops all
        os.kill(ranks[1], signal.SIGTERM)
    text = finish(process, output, 90)
    if not whole_job:
        assert process.returncode == 0, text
    step = saved_step(tmp_path / "run")
    assert f"stopped after step {step} of 100000; everything is saved. Go on with:" in text
    assert re.search(r"ACCELERATE_USE_CPU=true .*--num_processes 2 -m first_stage train ", text)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "killed"), [(3, 1), (2, 0)])
def test_the_death_of_one_process_ends_the_others_with_its_name(
    tmp_path, images, processes, killed
):
    process, output = begin(tmp_path, images, processes, **{"train.checkpoint_every": 2})
    ranks = trainings(process.pid)
    assert sorted(ranks) == list(range(processes))
    began = time.monotonic()
    os.kill(ranks[killed], signal.SIGKILL)
    text = finish(process, output, 60)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    assert re.search(rf"error: process {killed} \(pid {ranks[killed]} on .*\) died", text), text
    assert len(re.findall(r"error: process", text)) == 1  # perhaps behind the progress bar
    for pid in ranks.values():
        assert not Path(f"/proc/{pid}").exists()
    for _, checkpoint in list_checkpoints(tmp_path / "run"):
        load_checkpoint(checkpoint)


@pytest.mark.slow
def test_a_killed_data_worker_of_one_process_ends_all_with_every_step_saved(tmp_path, images):
    process, output = begin(tmp_path, images, 2, **{"data.workers": 1})
    ranks = trainings(process.pid)
    (worker,) = descendants(ranks[1])
    os.kill(worker, signal.SIGKILL)
    text = finish(process, output, 90)
    assert process.returncode != 0
    step = saved_step(tmp_path / "run")
    assert "error: a data worker of process 1" in text
    assert f"Everything up to step {step} is saved; go on with: " in text
    assert text.count("error: a data worker") == 1


@pytest.mark.slow
def test_a_full_disk_is_told_once_by_several_processes(tmp_path, images):
    """Process 0 writes; the other one must not be left waiting for it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        output = tmp_path / "output.txt"
        fields = {"train.checkpoint_every": 1, "train.keep_checkpoints": 50}
        line = arguments(disk / "run", images, **{**ENDLESS, **fields})
        process = start(command(2, TRAIN, *line), output)
        text = finish(process, output, 90)
        assert process.returncode != 0
        assert len(re.findall("^error: .*No space left on device", text, re.M)) == 1
        assert text.count("error: process") == 0
        for _, checkpoint in list_checkpoints(disk / "run"):
            load_checkpoint(checkpoint)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


ON_TWO = {
    **{"train.max_steps": 6, "train.batch_size": 12, "train.log_every": 4},
    **{"train.checkpoint_every": 3, "train.keep_checkpoints": 9, "validation.every": 3},
}
RECORDING = Path(__file__).parents[1] / "helpers" / "recording.py"


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> Path:
    """A whole run on two processes: pictures, run folder and record."""
    root = tmp_path_factory.mktemp("on-two")
    (root / "images").mkdir()
    for index in range(12):
        picture(index).save(root / "images" / f"{index:02d}.png")
    line = arguments(root / "run", root / "images", **ON_TWO)
    run(2, RECORDING, root / "record", "-", *line, output=root / "output.txt")
    return root


def samples(folder: Path, world: int) -> dict[str, list]:
    """Samples of each step, over processes in their order."""
    parts = [
        json.loads((folder / f"samples-{rank}-of-{world}.json").read_text())
        for rank in range(world)
    ]
    return {step: [s for part in parts for s in part[step]] for step in parts[0]}


@pytest.mark.slow
@pytest.mark.parametrize("second", [1, 2, 3])
def test_a_run_on_two_processes_goes_on_on_any_number(tmp_path, on_two, second):
    """On the same number bit for bit, on another to rounding."""
    found = tmp_path / "found"
    shutil.copytree(on_two / "run", found)
    for leftover in ("checkpoints/step-000006", "export"):
        shutil.rmtree(found / leftover)
    line = arguments(found, on_two / "images", **ON_TWO, resume="latest")
    output = tmp_path / "output.txt"
    text = run(second, RECORDING, tmp_path / "record", "-", *line, output=output)
    assert "resuming at step 3" in text

    whole = samples(on_two / "record", 2)
    assert samples(tmp_path / "record", second) == {step: whole[step] for step in ("3", "4", "5")}
    logs = [read_log(folder / "log.jsonl") for folder in (on_two / "run", found)]
    if second == 2:
        last = "checkpoints/step-000006"
        assert logs[0] == logs[1]
        for file in ("first_stage", "critic", "optimizers", "means"):
            one, other = (f / last / f"{file}.safetensors" for f in (on_two / "run", found))
            assert one.read_bytes() == other.read_bytes()
    for one, other in zip(*logs, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)
