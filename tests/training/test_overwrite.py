"""`--overwrite true`: the earlier run is kept until the new one has saved something."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import arguments
from moments import moments
from test_checkpoint import save

from first_stage.config import parse_config
from first_stage.errors import UserError
from first_stage.training.checkpoint import list_checkpoints, load_checkpoint
from first_stage.training.loop import train
from first_stage.training.run_folder import ended, first_saved, prepare_folder
from first_stage.training.step import Trainer


def contents(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


@pytest.fixture
def run(tmp_path, images) -> Path:
    """A finished run, its checkpoints on another disk behind a link."""
    folder = tmp_path / "run"
    train(parse_config(arguments(folder, images, **{"train.max_steps": 2})))
    (folder / "checkpoints").rename(tmp_path / "disk")
    (folder / "checkpoints").symlink_to("../disk")
    assert list_checkpoints(folder)
    return folder


def diverging(trainer, step, batches, original=Trainer.training_step):
    original(trainer, step, batches)
    trainer.meter.add(step, {"loss/pixel": torch.tensor(float("nan"))})


def spoiled(tmp_path: Path, what: str) -> dict[str, object]:
    """Fields of a run that cannot work."""
    if what == "data.path":
        return {"data.path": tmp_path / "immages"}
    if what == "data":
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
        return {"data.path": tmp_path / "bad", "data.validation_share": 0}
    if what == "pretrained":
        (tmp_path / "stage").mkdir()
        (tmp_path / "stage" / "config.json").write_text('{"_class_name": "AutoencoderKL"')
        return {"model.pretrained": tmp_path / "stage"}
    if what == "factor":
        return {"data.resolution": 15}
    if what == "precision":
        return {"train.precision": "fp16"}
    if what == "micro":
        return {"train.micro_batch_size": 3}
    return {}


@pytest.mark.parametrize(
    "what", ["data.path", "data", "pretrained", "factor", "precision", "micro", "diverged"]
)
def test_a_run_that_cannot_work_leaves_the_earlier_one(run, tmp_path, images, what):
    before = contents(run)
    fields = {"data.path": images, "overwrite": True, **spoiled(tmp_path, what)}
    step = diverging if what == "diverged" else Trainer.training_step
    with mock.patch.object(Trainer, "training_step", step), pytest.raises(UserError) as error:
        train(parse_config(arguments(run, fields.pop("data.path"), **fields)))
    assert "\n" not in str(error.value)
    found = contents(run)
    assert {n: h for n, h in found.items() if not n.startswith("failed-run/")} == before
    assert list_checkpoints(run)  # through the link
    assert ("failed-run/config.yaml" in found) == (what == "diverged")


def test_the_earlier_run_goes_when_the_new_one_has_saved_a_step(run, tmp_path, images):
    before = contents(run)
    seen = []

    def look(trainer, step, batches, original=Trainer.training_step):
        original(trainer, step, batches)
        seen.append((run / "replaced-run").exists())
        if seen[-1]:
            assert contents(run / "replaced-run") == {
                n: h for n, h in before.items() if not n.startswith("checkpoints/")
            }

    (run / "notes.txt").write_text("mine")
    fields = {"overwrite": True, "train.checkpoint_every": 2, "seed": 7}
    with mock.patch.object(Trainer, "training_step", look):
        assert train(parse_config(arguments(run, images, **fields))).finished
    assert seen == [True, True, False, False]
    assert not (run / "replaced-run").exists()
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "checkpoints").is_symlink()
    assert list((tmp_path / "disk").iterdir())  # the link went, not what it leads to
    assert [step for step, _ in list_checkpoints(run)] == [2, 4]
    load_checkpoint(list_checkpoints(run)[-1][1])


def test_a_folder_that_cannot_be_moved_is_told_and_stays(tmp_path, images):
    run = tmp_path / "run"
    train(parse_config(arguments(run, images, **{"train.max_steps": 2})))
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(run / "checkpoints")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        before = contents(run)
        with pytest.raises(UserError, match=r"cannot be set aside: .*checkpoints"):
            train(parse_config(arguments(run, images, overwrite=True)))
        assert contents(run) == before
    finally:
        subprocess.run(["umount", "-l", str(run / "checkpoints")], check=True)


def earlier(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, 5)
    for name in ("config.yaml", "log.jsonl"):
        (folder / name).write_text("earlier")
    os.symlink("nowhere", folder / "tracker")


def newer(folder: Path, step: int | None) -> None:
    prepare_folder(folder, overwrite=True, resume=False)
    (folder / "config.yaml").write_text("newer")
    if step is not None:
        save(folder, step)
        first_saved(folder)
    ended(folder)


def whole(folder: Path) -> str:
    """Which run is in a folder, with all of its files."""
    ((step, checkpoint),) = list_checkpoints(folder)
    load_checkpoint(checkpoint)
    text = (folder / "config.yaml").read_text()
    assert (text, step) in {("earlier", 5), ("newer", 2)}
    if text == "earlier":
        assert (folder / "log.jsonl").read_text() == "earlier"
        assert os.readlink(folder / "tracker") == "nowhere"
    return text


@pytest.mark.parametrize("how", ["kill", "fail"])
@pytest.mark.parametrize("step", [2, None], ids=["saved", "not saved"])
def test_one_of_the_two_runs_is_whole_at_every_moment(tmp_path, how, step):
    folder = tmp_path / "run"
    seen = set()
    for _ in moments(lambda: newer(folder, step), how, lambda: earlier(folder)):
        with pytest.raises(UserError, match="already holds a run"):
            prepare_folder(folder, overwrite=False, resume=False)
        seen.add(whole(folder))
        assert not (folder / ".moving-run").exists()
        assert not (folder / "replaced-run").exists()
    assert whole(folder) == ("newer" if step else "earlier")
    assert seen == ({"earlier", "newer"} if step else {"earlier"})


def test_overwriting_again_keeps_the_earlier_run_and_resuming_goes_on_with_the_new_one(tmp_path):
    folder = tmp_path / "run"
    earlier(folder)
    for _ in range(2):  # killed twice before it saved anything
        prepare_folder(folder, overwrite=True, resume=False)
        assert not (folder / "config.yaml").exists()
        assert whole(folder / "replaced-run") == "earlier"
        (folder / "config.yaml").write_text("newer")
    prepare_folder(folder, overwrite=False, resume=True)
    assert (folder / "config.yaml").read_text() == "newer"
    assert whole(folder / "replaced-run") == "earlier"
    save(folder, 2)
    prepare_folder(folder, overwrite=False, resume=True)  # killed right after the save
    assert not (folder / "replaced-run").exists()
    assert whole(folder) == "newer"
