"""Files that several packages share the readers and writers of."""

import math
import os

import pytest

from first_stage.errors import UserError, first_line
from first_stage.files import read_log, write_folder, write_json, write_text
from first_stage.locks import RecordLock


def test_a_log_whose_last_line_was_cut_off_is_read_up_to_it(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 1, "a": 2}\n\n{"step": 2}\n{"step": 3, "a"')
    assert read_log(path) == [{"step": 1, "a": 2}, {"step": 2}]


@pytest.mark.parametrize("line", ["{broken", '{"loss": 1}', "3"])
def test_a_damaged_line_before_the_last_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"line 2 of .*log\.jsonl' is damaged"):
        read_log(path)


def test_json_is_utf_8_and_never_holds_what_json_has_not(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é"}, indent=None)
    assert (tmp_path / "a.json").read_bytes() == '{"name": "é"}\n'.encode()
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "b.json", [value])
    assert not (tmp_path / "b.json").exists()


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, int]]:
    """What is synced and renamed, in order: the call, and the inode that it is about."""
    seen = []

    def watched(name):
        original = getattr(os, name)

        def call(what, *more):
            seen.append((name, os.stat(what).st_ino))
            return original(what, *more)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, watched(name))
    return seen


def test_a_file_survives_a_power_cut_once_it_has_its_name(tmp_path, calls):
    path = tmp_path / "a.txt"
    write_text(path, "new")
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("fsync", file), ("replace", file), ("fsync", folder)]


def test_a_folder_survives_a_power_cut_once_it_has_its_name(tmp_path, calls):
    def write(folder):
        (folder / "inner").mkdir()
        for name in ("a.txt", "inner/b.txt"):
            (folder / name).write_text(name)

    path = tmp_path / "new"
    write_folder(path, write)
    *within, renamed, last = calls
    assert set(within) == {("fsync", p.stat().st_ino) for p in (path, *path.rglob("*"))}
    assert renamed == ("rename", path.stat().st_ino)
    assert last == ("fsync", tmp_path.stat().st_ino)


def test_the_first_line_of_an_error_is_never_empty():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("\ntwo")) == "two"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_file_system_without_locks_keeps_nobody_off(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with RecordLock(tmp_path / ".lock") as lock:
        assert lock.take() is None
        lock.share()
