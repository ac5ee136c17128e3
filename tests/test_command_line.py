"""Command lines that are printed: the right program, launcher, device and quotes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from first_stage import command_line as module
from first_stage.command_line import command_line
from first_stage.commands.recipes import about
from first_stage.recipes import recipe_names


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher around, whatever runs the tests."""
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU", "GROUP_WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)


def environment_with(monkeypatch, folder: Path, *scripts: str) -> Path:
    """An environment whose interpreter has these scripts beside it."""
    (folder / "bin").mkdir(parents=True)
    for name in ("python", *scripts):
        script = folder / "bin" / name
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "bin/python"))
    return folder / "bin"


def test_installed_and_on_the_path(tmp_path, monkeypatch):
    place = environment_with(monkeypatch, tmp_path / "env", "first-stage", "accelerate")
    monkeypatch.setenv("PATH", str(place))
    assert command_line("train", "--config", "a b") == "first-stage train --config 'a b'"
    line = command_line("train", "--config", "x", processes=2)
    assert line == (
        "accelerate launch --multi_gpu --num_processes 2 -m first_stage train --config x"
    )


def test_a_clone_whose_environment_is_not_activated(tmp_path, monkeypatch):
    environment_with(monkeypatch, tmp_path / ".venv", "first-stage")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    assert command_line("cache") == ".venv/bin/first-stage cache"
    line = command_line("cache", processes=2)
    assert line.startswith(".venv/bin/python -m accelerate.commands.accelerate_cli launch ")


def test_nothing_installed(tmp_path, monkeypatch):
    place = environment_with(monkeypatch, tmp_path / "env")
    monkeypatch.setenv("PATH", "/usr/bin")
    assert command_line("train") == f"{place}/python -m first_stage train"


def test_a_launch_on_two_machines_with_cpus(monkeypatch):
    monkeypatch.setattr(module, "_program", lambda script, _: [script])
    launched = {"WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "True", "GROUP_WORLD_SIZE": "2"}
    launched |= {"GROUP_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert command_line("train", "--resume", "latest") == (
        "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 4 --num_machines 2 "
        "--machine_rank 0 --main_process_ip 10.0.0.1 --main_process_port 29500 "
        "-m first_stage train --resume latest"
    )
    assert "launch" not in command_line("latents", "info", "c")  # one process is enough


def test_the_line_runs_in_a_shell():
    """This environment's program, run where it is printed (a clone's is relative), with quotes."""
    line = command_line("recipes", "no 'such' recipe")
    result = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "\"no 'such' recipe\" is no recipe: there are " in result.stderr
    assert all(f" {name}, " in result.stderr for name in ("demo", "kl_f16"))
    assert shlex.split(line)[-1] == "no 'such' recipe"


def test_a_recipe_is_told_by_its_whole_first_sentence():
    for name in recipe_names():
        told = about(name)
        assert told.count("(") == told.count(")"), told
        assert not told.endswith("et al"), told
