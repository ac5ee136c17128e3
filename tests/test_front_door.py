"""`first-stage` and `import first_stage`: what is there, and that it is there at once."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import first_stage
from first_stage.__main__ import COMMANDS, main, wait_without_spinning
from first_stage.errors import ConfigError
from first_stage.recipes import find_config, recipe_file, recipe_names

HEAVY = ("torch", "diffusers", "datasets", "numpy", "jsonargparse")


def python(program: str, *line: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program, *line], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("line", [["--help"], ["recipes", "kl_f8"], ["--version"]])
def test_help_loads_nothing_heavy(line):
    program = (
        "import sys; from first_stage.__main__ import main; main(sys.argv[1:]); "
        f"print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    result = python(program, *line)
    assert result.stderr.strip() == "[]"
    assert result.stdout


def test_help_names_every_command(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)


def test_a_misspelt_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2
    assert "'trian' is no command: did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("name", first_stage.__all__)
def test_public_names_are_there(name):
    assert getattr(first_stage, name) is not None
    assert name in dir(first_stage)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        first_stage.nothing


class TestRecipes:
    def test_are_listed_with_what_they_are(self, capsys):
        main(["recipes"])
        said = capsys.readouterr().out
        for name in recipe_names():
            line = next(text for text in said.splitlines() if text.startswith(f"{name} "))
            assert len(line) > 30

    def test_one_is_printed_as_it_is(self, capsys):
        main(["recipes", "kl_f8"])
        said = capsys.readouterr().out
        assert said == (ROOT / "configs/kl_f8.yaml").read_text()
        assert yaml.safe_load(said)["model"]["latent_channels"] == 4

    def test_a_file_is_preferred_to_a_recipe_of_its_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_config("kl_f8") == str(recipe_file("kl_f8"))
        (tmp_path / "kl_f8").write_text("seed: 1\n")
        assert find_config("kl_f8") == "kl_f8"

    def test_neither_file_nor_recipe(self):
        with pytest.raises(ConfigError, match=r"'kl_f9' is neither a file nor a recipe.*kl_f8"):
            find_config("kl_f9")


class TestWaiting:
    def test_soon_sleeps_where_the_user_said_nothing(self, monkeypatch):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
            monkeypatch.setenv(name, "")  # so that it is as before afterwards
            monkeypatch.delenv(name)
        wait_without_spinning()
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
        assert os.environ["GOMP_SPINCOUNT"] == "10000"

    @pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
    def test_leaves_what_the_user_said(self, monkeypatch, name):
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        for other in names:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, "7")
        wait_without_spinning()
        assert {n: os.environ[n] for n in names if n in os.environ} == {name: "7"}
