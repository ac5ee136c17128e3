"""Files that several packages share the readers and writers of."""

import math

import pytest

from first_stage.errors import UserError, first_line
from first_stage.files import read_log, write_json
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
