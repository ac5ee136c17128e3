"""What a recipe may not do, and what `~` means in it."""

import sys
from pathlib import Path

import pytest

from first_stage.commands.evaluate import parse
from first_stage.config.parsing import parse_config, with_home
from first_stage.errors import ConfigError

FOREIGN = "foreign_module_of_a_recipe"
RECIPES = [
    *(f"{name}:\n  class_path: {FOREIGN}.Thing" for name in ("model", "loss", "train", "data")),
    *(f"{name}: {FOREIGN}.Thing" for name in ("model", "loss", "critic", "export")),
    f"model:\n  class_path: {FOREIGN}.Thing\n  init_args: {{}}",
    f"loss:\n  pretrained:\n    class_path: {FOREIGN}.Thing",
    f"loss:\n  pretrained: {FOREIGN}.Thing",
    f"class_path: {FOREIGN}.Thing",
    f"data:\n  validation_path:\n    class_path: {FOREIGN}.Thing",
]


@pytest.fixture
def foreign(tmp_path, monkeypatch) -> Path:
    """A module that leaves a trace when it is imported; gives the trace's path."""
    trace = tmp_path / "imported"
    (tmp_path / f"{FOREIGN}.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nclass Thing: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield trace
    sys.modules.pop(FOREIGN, None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_that_a_recipe_names_is_imported(foreign, tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(recipe + "\n")
    with pytest.raises(ConfigError) as error:
        parse_config(["--config", str(tmp_path / "recipe.yaml"), "--data.path", "photos"])
    assert not foreign.exists()
    assert "\n" not in str(error.value)
    assert "denylist" not in str(error.value)


@pytest.mark.parametrize("field", ["model", "loss", "loss.pretrained", "data"])
def test_nothing_that_a_flag_names_is_imported(foreign, field):
    with pytest.raises(ConfigError, match="no set of fields"):
        parse_config(["--data.path", "photos", f"--{field}", f"{FOREIGN}.Thing"])
    assert not foreign.exists()


def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "recipe.yaml").write_text(
        "output_dir: ~/runs\nresume: ~/runs/checkpoints/step-000001\n"
        "data: {path: ~/photos, validation_path: ~}\nmodel: {pretrained: '~/vae'}\n"
    )
    config = parse_config(["--config", str(tmp_path / "recipe.yaml")])
    assert config.output_dir == "/home/me/runs"
    assert config.resume == "/home/me/runs/checkpoints/step-000001"
    assert config.data.path == "/home/me/photos"
    assert config.data.validation_path is None  # YAML's other word for null
    assert config.model.pretrained == "/home/me/vae"
    line = ["--first_stage", "~/a", "b~", "--data.path", "~/d", "--output", "~/o"]
    read = parse(line)
    assert (read.first_stage, read.data.path, read.output) == (
        ["/home/me/a", "b~"], "/home/me/d", "/home/me/o",
    )  # fmt: skip
    assert with_home(("~", 1, None)) == ("/home/me", 1, None)
