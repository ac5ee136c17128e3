"""Files and folders: whole or not there, at every moment."""

import os
import shutil

import pytest
from moments import moments

from first_stage import files
from first_stage.files import remove_folder, remove_leftovers, standing, write_folder


@pytest.fixture
def place(tmp_path):
    return tmp_path / "run" / "export"


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def _file_system(request, monkeypatch):
    """Some file systems cannot exchange two names."""
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def fill(folder, text):
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (folder / name).write_text(text)


def content(folder) -> set[str]:
    """The texts of a folder with all of its files; one text when it is whole."""
    return {(folder / name).read_text() for name in ("a", "sub/b")}


def begin_with(place, text):
    shutil.rmtree(place.parent, ignore_errors=True)
    place.parent.mkdir()
    if text:
        fill(place, text)


@pytest.mark.usefixtures("_file_system")
@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_replaced_folder_is_whole_at_every_moment(place, how):
    work = lambda: write_folder(place, lambda folder: fill(folder, "new"))  # noqa: E731
    seen = []
    for _ in moments(work, how, lambda: begin_with(place, "old")):
        (found,) = content(standing(place))  # a reader
        remove_leftovers(place.parent)  # the next writer
        assert content(place) == {found}
        assert [entry.name for entry in place.parent.iterdir()] == ["export"]
        seen.append(found)
    assert content(place) == {"new"}
    assert how == "fail" or seen == sorted(seen, reverse=True)  # old, old, ..., new, new
    assert set(seen) == {"old", "new"}
    assert len(seen) > 10


@pytest.mark.usefixtures("_file_system")
@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_new_folder_is_whole_or_not_there(place, how):
    work = lambda: write_folder(place, lambda folder: fill(folder, "new"))  # noqa: E731
    for _ in moments(work, how, lambda: begin_with(place, None)):
        remove_leftovers(place.parent)
        assert not place.exists() or content(place) == {"new"}
    assert content(place) == {"new"}


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_removed_folder_is_whole_or_gone(place, how):
    for _ in moments(lambda: remove_folder(place), how, lambda: begin_with(place, "old")):
        assert not place.exists() or content(place) == {"old"}
        remove_leftovers(place.parent)
        assert not place.exists() or content(place) == {"old"}
    assert not place.exists()


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_putting_back_is_whole_at_every_moment_too(place, how):
    waiting = place.with_name(".tmp-0123abcd-old-export")

    def prepare():
        begin_with(place, None)
        fill(waiting, "old")
        fill(place.with_name(".tmp-4567abcd-export"), "half")

    for _ in moments(lambda: remove_leftovers(place.parent), how, prepare):
        assert content(standing(place)) == {"old"}
    assert [entry.name for entry in place.parent.iterdir()] == ["export"]


def test_a_second_rename_that_fails_leaves_the_old_folder(place, monkeypatch):
    """The case that once lost both."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    begin_with(place, "old")
    renamed = []

    def rename(source, target, original=os.rename):
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space"):
        write_folder(place, lambda folder: fill(folder, "new"))
    assert content(place) == {"old"}
    assert [entry.name for entry in place.parent.iterdir()] == ["export"]


@pytest.mark.usefixtures("_file_system")
def test_a_link_is_replaced_and_what_it_leads_to_stays(place, tmp_path):
    fill(tmp_path / "elsewhere", "old")
    place.parent.mkdir()
    for target in ("elsewhere", "nowhere"):
        place.symlink_to(tmp_path / target)
        write_folder(place, lambda folder: fill(folder, "new"))
        assert not place.is_symlink()
        assert content(place) == {"new"}
        assert [entry.name for entry in place.parent.iterdir()] == ["export"]
        remove_folder(place)
    assert content(tmp_path / "elsewhere") == {"old"}
    place.symlink_to(tmp_path / "elsewhere")
    remove_folder(place)
    assert content(tmp_path / "elsewhere") == {"old"}
    assert not list(place.parent.iterdir())
