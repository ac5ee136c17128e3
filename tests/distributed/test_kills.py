"""SIGKILL, again and again: a run ends where an undisturbed one ends, and nothing is lost."""

import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import arguments
from launching import TRAIN, command, finish, kill_group, run, start

from first_stage.errors import UserError
from first_stage.files import standing
from first_stage.training.checkpoint import list_checkpoints, load_checkpoint
from first_stage.training.log import read_log
from first_stage.training.run_folder import prepare_folder

FIELDS = {
    **{"train.checkpoint_every": 3, "train.log_every": 2},
    **{"train.ema_decay": 0.9, "train.decay_steps": 50, "validation.every": 20},
    **{"validation.pictures": 1, "data.workers": 1},
}
CODES = {"model.family": "vq", "model.vq.codes": 48, "model.vq.restart_after": 2}


def hashes(folder: Path) -> dict[str, str]:
    files = ["log.jsonl", "training.gif", "config.yaml"]
    files += [f"export/{file.name}" for file in (folder / "export").iterdir()]
    last = list_checkpoints(folder)[-1][1]
    files += [file.relative_to(folder).as_posix() for file in last.rglob("*") if file.is_file()]
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
@pytest.mark.parametrize(
    ("more", "steps", "kills_wanted", "in_saves"),
    [pytest.param({}, 260, 22, 11, id="kl"), pytest.param(CODES, 90, 4, 2, id="vq")],
)
def test_a_run_that_is_killed_over_and_over_ends_where_an_undisturbed_one_does(
    tmp_path, images, more, steps, kills_wanted, in_saves
):
    """Of a codebook also its restarts and usage, which stand in the last checkpoint."""
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    fields = arguments("run", images, **FIELDS, **more, **{"train.max_steps": steps})
    run(1, TRAIN, *fields, output=tmp_path / "undisturbed.txt", cwd=tmp_path / "undisturbed")
    expected = hashes(tmp_path / "undisturbed" / "run")

    root = tmp_path / "killed"
    (root / "run.yaml").write_text((tmp_path / "undisturbed" / "run" / "config.yaml").read_text())
    draw, kills, hits, reached = random.Random(0), 0, 0, 0
    while kills < kills_wanted or hits < in_saves:
        in_save = hits < in_saves and (kills % 2 == 0 or kills >= kills_wanted - in_saves)
        hits += live_and_be_killed(root / "run", tmp_path / "killed.txt", in_save, draw)
        kills += 1
        saved = list_checkpoints(root / "run")
        for _, checkpoint in saved:
            load_checkpoint(checkpoint)  # every one that has its name is whole
        if saved:
            assert saved[-1][0] >= reached  # nothing that was saved is ever lost
            reached = saved[-1][0]
    assert reached < steps
    last = start(
        command(1, TRAIN, "--config", "run.yaml", "--resume", "latest"),
        tmp_path / "killed.txt",
        cwd=root,
    )
    text = finish(last, tmp_path / "killed.txt")
    assert last.returncode == 0, text
    assert hashes(root / "run") == expected
    assert not list((root / "run").rglob(".tmp-*"))


def kill_when(process, output: Path, due, draw: random.Random, longest: float) -> None:
    """SIGKILL a job a random while after something is seen."""
    end = time.monotonic() + 120
    while not due():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < end, output.read_text()
    time.sleep(draw.uniform(0, longest))
    kill_group(process)


def files_of(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_during_overwrite_lose_no_run(tmp_path, images):
    """The earlier run is whole until the new one has a checkpoint, wherever the kill falls."""
    run_folder, output = tmp_path / "run", tmp_path / "output.txt"
    fields = {**FIELDS, "train.max_steps": 4, "train.decay_steps": 0, "validation.every": 2}
    run(1, TRAIN, *arguments(run_folder, images, **fields), output=output)
    kept = tmp_path / "kept"
    shutil.copytree(run_folder, kept, symlinks=True)
    names = [entry.name for entry in kept.iterdir() if entry.name != ".lock"]
    expected = {name: value for name, value in files_of(kept).items() if name != ".lock"}
    moments = {
        "moving": lambda: any((run_folder / n).exists() for n in (".moving-run", "replaced-run")),
        "saving": lambda: (run_folder / "replaced-run").exists() and is_saving(run_folder),
        "saved": lambda: not moments["moving"]() and bool(list_checkpoints(run_folder)),
    }
    draw, outcomes = random.Random(0), set()
    line = command(1, TRAIN, *arguments(run_folder, images, **fields, seed=1, overwrite=True))
    for kill in range(20):
        shutil.rmtree(run_folder)
        shutil.copytree(kept, run_folder, symlinks=True)
        moment = list(moments)[kill % 3]
        before = moments["moving"] if moment == "saved" else lambda: True
        process = start(line, output)
        end = time.monotonic() + 120
        while not before():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < end, output.read_text()
        kill_when(process, output, moments[moment], draw, 0.02 if moment != "saved" else 0.3)
        # What the next start makes of it.
        with pytest.raises(UserError, match="already holds a run"):
            prepare_folder(run_folder, overwrite=False, resume=False)
        found = {n: h for n, h in files_of(run_folder).items() if n.split("/")[0] in names}
        if found == expected:
            outcomes.add("earlier")
            continue
        outcomes.add("newer")
        saved = list_checkpoints(run_folder)
        assert saved, sorted(found)
        for _, checkpoint in saved:
            assert load_checkpoint(checkpoint).state["config"]["seed"] == 1
    assert outcomes == {"earlier", "newer"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_during_the_export_leave_a_whole_one(tmp_path, images):
    output = tmp_path / "output.txt"
    fields = {**FIELDS, "train.max_steps": 4, "train.decay_steps": 0, "validation.every": 2}
    run(1, TRAIN, *arguments("run", images, **fields), output=output, cwd=tmp_path)
    export = tmp_path / "run" / "export"
    expected, inode = files_of(export), export.stat().st_ino
    draw, replaced = random.Random(0), 0
    line = command(1, TRAIN, "--config", "run/config.yaml", "--resume", "latest")

    def has_replaced() -> bool:
        return standing(export).stat().st_ino != inode

    def is_exporting() -> bool:
        return bool(list(export.parent.glob(".tmp-*-export"))) or has_replaced()

    for kill in range(20):
        process = start(line, output, cwd=tmp_path)
        kill_when(process, output, has_replaced if kill % 4 == 0 else is_exporting, draw, 0.03)
        assert files_of(standing(export)) == expected
        prepare_folder(tmp_path / "run", overwrite=False, resume=True)
        assert files_of(export) == expected
        assert not list(export.parent.glob(".tmp-*"))
        replaced += export.stat().st_ino != inode
        inode = export.stat().st_ino
    assert 0 < replaced < 20  # kills fell before and after the new one took its place
