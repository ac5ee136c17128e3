"""How commands end in a shell: by Ctrl-C, on a full disk, and when nobody reads what they say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, arguments
from launching import environment, wait_until

from first_stage.__main__ import COMMANDS
from first_stage.training.checkpoint import list_checkpoints

FIRST_STAGE = [sys.executable, "-m", "first_stage"]


def start(*line: object, **options) -> subprocess.Popen:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(
        [*FIRST_STAGE, *map(str, line)], cwd=ROOT, env=environment(), text=True, **given
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code, and what came to stderr."""
    _, err = process.communicate(timeout=120)
    return process.returncode, err or ""


@pytest.mark.parametrize("line", [["--help"], ["recipes"], ["recipes", "kl_f8"]])
def test_a_reader_who_has_gone_is_no_error(line):
    """As with `first-stage recipes | head -1`: what is written comes to nobody."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*line, stdout=writing)
    os.close(writing)
    assert ended(process) == (128 + signal.SIGPIPE, "")


def test_a_shells_pipe():
    line = f"set -o pipefail; {' '.join(FIRST_STAGE)} recipes | head -1"
    result = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_an_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        code, said = ended(start("recipes", "kl_f8", stdout=full))
    assert code == 2
    assert said == (
        "error: the output cannot be written: No space left on device; free some space\n"
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs(closed):
    line = f"{' '.join(FIRST_STAGE)} recipes {closed}"
    result = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "recipes"])
def test_control_c_while_a_command_starts_is_one_line(command):
    process = start(command, "--help")
    wait_until(lambda: "first_stage" in Path(f"/proc/{process.pid}/cmdline").read_text())
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "_multiarray_umath" in maps.read_text() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert (code, said) in ((130, "stopped\n"), (0, ""))


class TestATraining:
    """What is lost with the terminal is not lost with the run."""

    def begin(self, tmp_path, images, **options) -> subprocess.Popen:
        endless = {"train__max_steps": 100000, "train__checkpoint_every": 100000}
        line = arguments(tmp_path / "run", images, **endless)
        process = start("train", *line, **options)
        log = tmp_path / "run/log.jsonl"
        wait_until(
            lambda: process.poll() is not None or (log.exists() and log.stat().st_size > 999)
        )
        return process

    def test_goes_on_when_nobody_reads_its_progress(self, tmp_path, images):
        reading, writing = os.pipe()
        process = self.begin(tmp_path, images, stdout=writing, stderr=writing)
        os.close(writing)
        os.close(reading)
        log = tmp_path / "run/log.jsonl"
        size, began = log.stat().st_size, time.monotonic()
        # The bar is drawn every 10 s where it is no terminal.
        wait_until(lambda: process.poll() is not None or time.monotonic() - began > 11)
        assert process.poll() is None
        assert log.stat().st_size > size
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert len(list_checkpoints(tmp_path / "run")) == 1

    def test_is_saved_when_its_terminal_is_closed(self, tmp_path, images):
        process = self.begin(
            tmp_path,
            images,
            start_new_session=True,
            # Under `nohup` it would be ignored, here as there.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        os.killpg(process.pid, signal.SIGHUP)
        code, said = ended(process)
        assert code == 0, said
        assert len(list_checkpoints(tmp_path / "run")) == 1
