"""Checkpoints: whole, checked, counted."""

import contextlib
import json

import pytest
import torch

from first_stage.errors import UserError
from first_stage.files import sha256
from first_stage.training import checkpoint
from first_stage.training.checkpoint import (
    DamagedCheckpoint,
    Snapshot,
    find_checkpoint,
    flatten_optimizer,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    restore_optimizer,
    save_checkpoint,
    set_aside,
)


class Average:
    """Stands in for the averaged model: writes one file."""

    def save_pretrained(self, folder, safe_serialization):
        assert safe_serialization
        folder.mkdir()
        (folder / "config.json").write_text("{}")


def save(folder, step, keep=10, tensors=None):
    tensors = tensors or {"first_stage": {"w": torch.full((3,), float(step))}}
    snapshot = Snapshot(step, tensors, {"note": "x"})
    return save_checkpoint(folder, snapshot, lambda: contextlib.nullcontext(Average()), keep)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 7))
    assert loaded.step == 7
    assert loaded.state == {"note": "x"}
    assert torch.equal(loaded.tensors["first_stage"]["w"], torch.full((3,), 7.0))


def test_only_one_process_hashes(tmp_path, monkeypatch):
    """One verifies for all of a job; to read is then enough."""
    folder, hashed = save(tmp_path, 7), []
    monkeypatch.setattr(checkpoint, "sha256", lambda file: hashed.append(file) or sha256(file))
    find_checkpoint(tmp_path, "latest")
    assert len(hashed) == len(set(hashed)) == sum(f.is_file() for f in folder.rglob("*")) - 1
    assert read_checkpoint(folder).step == 7
    assert len(hashed) == len(set(hashed))
    (folder / "first_stage.safetensors").unlink()  # on a machine with a disk of its own
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        read_checkpoint(folder)


def test_the_average_does_not_take_the_place_of_the_weights(tmp_path):
    """The average may be swapped into the very tensors that the snapshot refers to."""
    weights = torch.ones(3)

    @contextlib.contextmanager
    def swapped():
        kept = weights.clone()
        weights.zero_()
        yield Average()
        weights.copy_(kept)

    snapshot = Snapshot(1, {"first_stage": {"w": weights}}, {})
    loaded = load_checkpoint(save_checkpoint(tmp_path, snapshot, swapped, 1))
    assert torch.equal(loaded.tensors["first_stage"]["w"], torch.ones(3))


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 4]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-000003", "step-000004"}


@pytest.mark.parametrize("file", ["first_stage.safetensors", "state.json", "ema/config.json"])
@pytest.mark.parametrize("how", ["altered", "cut", "missing"])
def test_every_damage_is_found_and_the_one_before_taken(tmp_path, file, how):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    path = folder / file
    data = path.read_bytes()
    if how == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(DamagedCheckpoint, match=file):
        load_checkpoint(folder)
    found, remarks = find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert found.name == "step-000001"
    assert len(remarks) == 1
    assert file in remarks[0]


@pytest.mark.parametrize("text", [None, "", "{", '{"../outside": "0"}', "{}"])
def test_damaged_checksums_are_damage_too(tmp_path, text):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    if text is None:
        (folder / "checksums.json").unlink()
    else:
        (folder / "checksums.json").write_text(text)
    found, remarks = find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert found.name == "step-000001"
    assert remarks


def test_when_all_are_damaged_nothing_is_trained_over_them(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint(tmp_path, "latest")


def test_a_half_written_checkpoint_is_never_seen(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".tmp-12345678-step-000002"
    half.mkdir()
    (half / "first_stage.safetensors").write_bytes(b"half")
    found, remarks = find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert (found.name, remarks) == ("step-000001", [])
    assert not half.exists()


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="is not a checkpoint: it has no checksums"):
        find_checkpoint(tmp_path, str(tmp_path))
    assert find_checkpoint(tmp_path, "latest") == (None, [])


def test_setting_aside_deletes_nothing(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    moved = set_aside(tmp_path, 1)
    save(tmp_path, 2)
    moved += set_aside(tmp_path, 1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]
    assert [p.name for p in moved] == [
        "set-aside-step-000002",
        "set-aside-step-000003",
        "set-aside-step-000002-2",
    ]
    for folder in moved:
        assert json.loads((folder / "state.json").read_text())["step"] in (2, 3)


def test_an_optimizer_goes_on_from_its_tensors():
    def trained(parameter, optimizer, steps):
        for step in range(steps):
            parameter.grad = torch.sin(torch.arange(4.0) + step + optimizer_steps[0])
            optimizer.step()
        optimizer_steps[0] += steps

    results = []
    for split in (False, True):
        optimizer_steps = [0]
        parameter = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        trained(parameter, optimizer, 3)
        if split:
            flat = {k: v.clone() for k, v in flatten_optimizer(optimizer, "a").items()}
            flat |= {"b/0/step": torch.tensor(9.0)}  # another owner's are left alone
            optimizer = torch.optim.AdamW([parameter], lr=0.1)
            restore_optimizer(optimizer, flat, "a")
        trained(parameter, optimizer, 3)
        results.append(parameter.detach().clone())
    assert torch.equal(*results)
