"""SIGKILL, again and again: the run still ends where an undisturbed one ends."""

import hashlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import arguments
from launching import TRAIN, command, finish, kill_group, run, start

from first_stage.training.checkpoint import list_checkpoints, load_checkpoint
from first_stage.training.log import read_log

KILLS, IN_SAVES = 22, 11
STEPS = 260
FIELDS = {
    **{"train.max_steps": STEPS, "train.checkpoint_every": 3, "train.log_every": 2},
    **{"train.ema_decay": 0.9, "train.decay_steps": 50, "validation.every": 20},
    **{"validation.pictures": 1, "data.workers": 1},
}


def hashes(folder: Path) -> dict[str, str]:
    files = ["log.jsonl", "training.gif", "config.yaml"]
    files += [f"export/{file.name}" for file in (folder / "export").iterdir()]
    found = {}
    for name in files:
        found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return found


def steps_logged(folder: Path) -> int:
    return max((line["step"] for line in read_log(folder / "log.jsonl")), default=0)


def is_saving(folder: Path) -> bool:
    try:
        return any(name.startswith(".tmp-") for name in os.listdir(folder / "checkpoints"))
    except FileNotFoundError:
        return False


def live_and_be_killed(folder: Path, output: Path, in_save: bool, draw: random.Random) -> bool:
    """Start or go on, then SIGKILL everything; whether that hit a save half-way."""
    line = command(1, TRAIN, "--config", "run.yaml", "--resume", "latest")
    process = start(line, output, cwd=folder.parent)
    try:
        before = steps_logged(folder)
        end = time.monotonic() + 60
        while steps_logged(folder) == before or not list_checkpoints(folder):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.01)
        if in_save:
            # Not the first save that comes along, nor always at its beginning.
            time.sleep(draw.uniform(0, 0.3))
            while not is_saving(folder):
                assert process.poll() is None, output.read_text()
            time.sleep(draw.uniform(0, 0.015))
        else:
            time.sleep(draw.uniform(0, 0.5))
        assert process.poll() is None, "the run finished before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGSTOP)  # what is seen now is what the kill leaves
        hit = is_saving(folder)
        kill_group(process)
    return hit


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_over_and_over_ends_where_an_undisturbed_one_does(tmp_path, images):
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    fields = arguments("run", images, **FIELDS)
    run(1, TRAIN, *fields, output=tmp_path / "undisturbed.txt", cwd=tmp_path / "undisturbed")
    expected = hashes(tmp_path / "undisturbed" / "run")

    root = tmp_path / "killed"
    (root / "run.yaml").write_text((tmp_path / "undisturbed" / "run" / "config.yaml").read_text())
    draw, kills, hits, reached = random.Random(0), 0, 0, 0
    while kills < KILLS or hits < IN_SAVES:
        in_save = hits < IN_SAVES and (kills % 2 == 0 or kills >= KILLS - IN_SAVES)
        hits += live_and_be_killed(root / "run", tmp_path / "killed.txt", in_save, draw)
        kills += 1
        saved = list_checkpoints(root / "run")
        for _, checkpoint in saved:
            load_checkpoint(checkpoint)  # every one that has its name is whole
        if saved:
            assert saved[-1][0] >= reached  # nothing that was saved is ever lost
            reached = saved[-1][0]
    assert reached < STEPS
    last = start(
        command(1, TRAIN, "--config", "run.yaml", "--resume", "latest"),
        tmp_path / "killed.txt",
        cwd=root,
    )
    text = finish(last, tmp_path / "killed.txt")
    assert last.returncode == 0, text
    assert hashes(root / "run") == expected
    assert not list((root / "run").rglob(".tmp-*"))
