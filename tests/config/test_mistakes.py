"""Mistakes in a recipe's file and on a command line: file or field, value, remedy, in one line."""

import pytest

from first_stage.config.parsing import parse_config
from first_stage.errors import ConfigError
from latent_tools.__main__ import main as latents


def told(*arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config([*map(str, arguments), "--data.path", "photos"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (b"", "is empty: first-stage recipes"),
        (b"- a", "holds a list instead of fields"),
        (b"\xff\xfe\x00", "is no text"),
        (b"data: {path: plain\nmodel: 3", "is no YAML in line 2: "),
        (b"trian: {max_steps: 3}", "there is no field trian: did you mean train?"),
        (b"data: {resolutoin: 32}", "no field data.resolutoin: did you mean data.resolution?"),
        (b"data: {max_steps: 3}", "no field data.max_steps: did you mean train.max_steps?"),
        (b"xyz: 3", "there is no field xyz"),
        (b"train: 5", "train is 5; it must be a section of fields, such as train.max_steps"),
        (b"train: []", "train is []; it must be a section of fields"),
        (b"train:", "train is empty; it must be a section of fields"),
        (b"loss: 3", "loss is 3; it must be a section of fields, such as loss.pixel"),
        (b"loss: {learned: 2}", "loss.learned is 2; it must be a section of fields"),
        (b"disturb: {noise: 3}", "disturb.noise is 3; it must be a section of fields"),
        (b"disturb: no", "disturb is False; it must be a section of fields"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_told_with_its_file(tmp_path, recipe, words):
    (tmp_path / "mine.yaml").write_bytes(recipe)
    for given in (["--config", tmp_path / "mine.yaml"], [f"--config={tmp_path}/mine.yaml"]):
        line = told(*given)
        assert line.startswith(f"--config '{tmp_path}/mine.yaml'")
        assert words in line


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--data.pth", "x", "--data.pth x: did you mean --data.path?"),
        ("--max_steps", "3", "--max_steps 3: did you mean --train.max_steps?"),
        ("--output_dir", "", "output_dir is empty: give a folder"),
        ("--output_dir", " ", "output_dir is empty: give a folder"),
        ("--xyz", "3", "--xyz 3; --help lists the fields"),
        ("--loss", "3", "loss is 3; it must be a section: set its fields, such as --loss.pixel"),
        ("--plan", "maybe", "plan is maybe; it must be a bool"),
        ("--loss.pixel", "l3", "loss.pixel is l3; it must be a choice of l1, l2, huber"),
        ("--data.flip", "3", "data.flip is 3; it must be a bool or choice of none, horizontal"),
        ("--loss.penalties", "3", "loss.penalties is 3; it must be a mapping"),
        ("--data.crop_shape", "x", "data.crop_shape is x; it must be a list or null"),
    ],
)
def test_a_flag_that_cannot_be_meant(flag, value, words):
    assert words in told(flag, value)


def test_a_missing_subcommand_is_told_with_all_that_there_are():
    with pytest.raises(ConfigError, match=r"there are info, verify, stats, preview, gc, export;"):
        latents([])


def test_dotted_fields_and_free_names_in_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("train.max_steps: 3\nloss: {penalties: {kl: 1}}\n")
    config = parse_config(["--config", str(tmp_path / "mine.yaml"), "--data.path", "photos"])
    assert config.train.max_steps == 3
    assert config.loss.penalties == {"kl": 1}
