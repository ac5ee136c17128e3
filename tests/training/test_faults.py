"""Each accident for real: it ends in words, and nothing that was saved is lost."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import arguments
from launching import TRAIN, finish, start
from torch.utils.data import DataLoader

from first_stage.config import parse_config
from first_stage.errors import UserError
from first_stage.files import WriteError, read_log
from first_stage.training.checkpoint import list_checkpoints, load_checkpoint
from first_stage.training.endings import OutOfMemory
from first_stage.training.loop import train
from first_stage.training.run_folder import locked
from first_stage.training.step import Trainer


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


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed, most often because memory ran out"),
        (signal.SIGBUS, "found no room in /dev/shm"),
        (signal.SIGSEGV, "crashed (Segmentation fault)"),
    ],
)
def test_a_data_worker_that_dies_ends_in_words_with_every_step_saved(
    tmp_path, images, number, words
):
    def kill_workers():
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), number)

    fields = {"data.workers": 1, "train.max_steps": 400, "train.batch_size": 2}
    next(iter(DataLoader([0], num_workers=1)))  # which leaves torch's handler, once per process
    with at_step(3, kill_workers), pytest.raises(UserError, match="data worker") as error:
        train(parse_config(arguments(tmp_path / "run", images, **fields)))
    text = one_line(error)
    assert "process 0" in text
    assert words in text
    ((step, _),) = list_checkpoints(tmp_path / "run")
    assert step >= 3  # what was fetched before is still trained on
    assert f"Everything up to step {step} is saved" in text
    assert "--resume latest" in text
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert max(line["step"] for line in lines) == step


@pytest.mark.parametrize("size", [8, 48])  # no room for the queues, and none for batches
def test_shared_memory_that_is_too_small_is_told(tmp_path, images, size):
    """As in a container that was given the usual 64 MiB."""
    output = tmp_path / "output.txt"
    small = f"mount -t tmpfs -o size={size}k tmpfs /dev/shm"
    fields = {"data.workers": 1, "train.max_steps": 400, "data.resolution": 32}
    line = [sys.executable, str(TRAIN), *arguments(tmp_path / "run", images, **fields)]
    if subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("/dev/shm cannot be replaced here")
    process = start(["unshare", "-m", "sh", "-c", f"{small} && exec {shlex.join(line)}"], output)
    text = finish(process, output, 120)
    assert process.returncode == 2, text
    assert "error: a data worker of process 0" in text
    assert "found no room in /dev/shm" in text
    assert "--shm-size" in text


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
    else:
        assert "No step had been saved yet; start again with: " in text
    assert "mend or remove them, or raise it" in text
    assert "--resume latest" in text
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


@pytest.mark.parametrize("how", ["torch", "python", "cuda"])
def test_memory_that_runs_out_is_told_with_what_to_lower(tmp_path, images, how):
    def run_out():
        if how == "torch":
            torch.empty(2**60, dtype=torch.uint8)
        elif how == "python":
            bytearray(2**60)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    fields = {"train.checkpoint_every": 1, "train.micro_batch_size": 2, "train.max_steps": 9}
    with at_step(3, run_out), pytest.raises(OutOfMemory) as error:
        train(parse_config(arguments(tmp_path / "run", images, **fields)))
    text = one_line(error)
    for words in (
        "lower train.micro_batch_size (2 now)",
        "set model.gradient_checkpointing to true",
        "lower data.resolution (16 now)",
        "Everything up to step 2 is saved",
        "--resume latest",
    ):
        assert words in text
    less = {**fields, "train.micro_batch_size": 1, "model.gradient_checkpointing": True}
    outcome = train(parse_config(arguments(tmp_path / "run", images, **less, resume="latest")))
    assert outcome.finished


def test_other_errors_are_not_taken_for_memory(tmp_path, images):
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with at_step(1, fail), pytest.raises(RuntimeError, match="shapes") as error:
        train(parse_config(arguments(tmp_path / "run", images)))
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["open_data", "fixed_images", "validate"])
def test_a_signal_before_the_first_step_is_obeyed_at_once(tmp_path, images, number, where):
    """While files are listed, rows counted, or the untrained first stage is measured."""
    went_on = []

    def listing(*_, **__):
        signal.raise_signal(number)
        went_on.append(True)

    handler = signal.getsignal(number)
    with mock.patch(f"first_stage.training.loop.{where}", listing):
        outcome = train(parse_config(arguments(tmp_path / "run", images)))
    assert (outcome.finished, outcome.step, went_on) == (False, 0, [])
    assert signal.getsignal(number) == handler
    assert train(parse_config(arguments(tmp_path / "run", images, overwrite=True))).finished


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
