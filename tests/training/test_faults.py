"""Each accident for real: it ends in words, and nothing that was saved is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import arguments

from first_stage.config import parse_config
from first_stage.errors import UserError
from first_stage.files import WriteError, read_log
from first_stage.training.checkpoint import list_checkpoints, load_checkpoint
from first_stage.training.loop import train
from first_stage.training.run_folder import locked
from first_stage.training.step import Trainer


@pytest.fixture
def disk(tmp_path):
    """Mounts small file systems; `disk(kilobytes, options)` is the folder."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        options = f"size={kilobytes}k"
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
            )
        except OSError as error:
            pytest.skip(f"no small file system can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no small file system can be mounted here: {done.stderr.decode()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def at_step(step: int, work):
    """Does something while the step after so many is computed."""
    original = Trainer.training_step

    def training_step(trainer, done, batches):
        original(trainer, done, batches)
        if done + 1 == step:
            work()

    return mock.patch.object(Trainer, "training_step", training_step)


def test_a_full_disk_ends_in_words_and_keeps_the_last_checkpoint(disk, images):
    folder = disk(1600)
    fields = {"train.checkpoint_every": 1, "train.max_steps": 30, "train.keep_checkpoints": 30}
    with pytest.raises(WriteError, match="No space left on device; free some space") as error:
        train(parse_config(arguments(folder / "run", images, **fields)))
    text = one_line(error)
    saved = list_checkpoints(folder / "run")
    assert len(saved) >= 1
    assert f"Everything up to step {saved[-1][0]} is saved" in text
    assert "--resume latest" in text
    for _, checkpoint in saved:
        load_checkpoint(checkpoint)  # whole, every one
    assert not list((folder / "run" / "checkpoints").glob(".tmp-*"))  # its space is free again

    # With more space the run goes on where it was.
    subprocess.run(["mount", "-o", "remount,size=20000k", str(folder)], check=True)
    fields["train.max_steps"] = saved[-1][0] + 1
    outcome = train(parse_config(arguments(folder / "run", images, **fields, resume="latest")))
    assert outcome.finished


def test_a_read_only_output_folder_is_told_before_anything_else(disk, images):
    folder = disk(2000)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with pytest.raises(UserError, match=r"output_dir .* cannot be written: Read-only file system"):
        train(parse_config(arguments(folder / "run", images)))


def test_an_output_folder_that_cannot_be_made_is_told_before_anything_else(tmp_path, images):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"output_dir .* cannot be written: Not a directory"):
        train(parse_config(arguments(tmp_path / "file" / "run", images)))


def test_a_killed_data_worker_ends_in_words_with_every_step_saved(tmp_path, images):
    def kill_workers():
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)

    fields = {"data.workers": 1, "train.max_steps": 400, "train.batch_size": 2}
    handler = signal.getsignal(signal.SIGCHLD)
    with at_step(3, kill_workers), pytest.raises(UserError, match="data worker") as error:
        train(parse_config(arguments(tmp_path / "run", images, **fields)))
    assert signal.getsignal(signal.SIGCHLD) == handler
    text = one_line(error)
    assert "process 0" in text
    assert "was killed" in text
    ((step, _),) = list_checkpoints(tmp_path / "run")
    assert step >= 3  # what was fetched before is still trained on
    assert f"Everything up to step {step} is saved" in text
    assert "--resume latest" in text
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert max(line["step"] for line in lines) == step


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_files_end_in_words_with_every_step_saved(tmp_path, images, workers):
    for file in sorted(images.iterdir())[:6]:
        file.write_bytes(b"no picture")
    fields = {"data.max_broken": 0.05, "train.max_steps": 9, "data.workers": workers}
    with pytest.raises(UserError, match=r"more than data\.max_broken") as error:
        train(parse_config(arguments(tmp_path / "run", images, **fields)))
    text = one_line(error)
    listed = [json.loads(x) for x in (tmp_path / "run" / "broken_files.jsonl").open()]
    assert listed[0]["reason"] == "not an image that Pillow can read"
    saved = list_checkpoints(tmp_path / "run")
    if saved:
        assert f"Everything up to step {saved[0][0]} is saved" in text
    more = arguments(
        tmp_path / "run", images, **{**fields, "data.max_broken": 1, "resume": "latest"}
    )
    assert train(parse_config(more)).finished


def test_data_that_cannot_be_decoded_at_all_is_told_in_one_line_from_a_worker(tmp_path, images):
    good = sorted(images.iterdir())
    for file in good:
        file.write_bytes(b"no picture")
    from conftest import picture

    held_out = tmp_path / "held-out"
    held_out.mkdir()
    picture(0).save(held_out / "a.png")
    fields = {"data.workers": 1, "data.validation_path": held_out}
    with pytest.raises(UserError, match=r"samples in a row of .* cannot be decoded") as error:
        train(parse_config(arguments(tmp_path / "run", images, **fields)))
    assert "Traceback" not in one_line(error)


def test_two_runs_cannot_write_into_one_folder(tmp_path, images):
    script = (
        "import sys; from pathlib import Path; from first_stage.training.run_folder import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"written by another run .pid {other.pid} on "):
            train(parse_config(arguments(run, images)))
        other.kill()  # the lock dies with its holder, and with nothing it forked
        other.wait()
        with locked(run):
            pass
