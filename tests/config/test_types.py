"""Ranges of fields: refused from YAML, from flags and from Python, in the same line."""

import math
from dataclasses import replace
from typing import Any

import pytest
import yaml

from first_stage.config import Config, check, parse_config
from first_stage.config.types import changeable, misfits, plain
from first_stage.errors import ConfigError

REFUSED: dict[str, Any] = {
    "train.clip_norm": -1.0,
    "train.max_steps": 0,
    "train.learning_rate": math.nan,
    "train.process_timeout": math.inf,
    "train.ema_decay": 1.0,
    "critic.learning_rate": 0.0,
    "critic.layers": 6,
    "validation.resolution": -16,
    "validation.resize": -1,
    "validation.images": 0,
    "export.images": 0,
    "data.max_broken": 1.5,
    "data.workers": -1,
    "loss.kl_weight": -math.inf,
    "loss.huber_delta": 0.0,
    "loss.pixel_cutoff": 0.8,
    "loss.balance.max_weight": math.inf,
    "loss.learned.start_step": -1,
    "loss.learned.layer_weights": [-1.0],
    "seed": -1,
}
IN_PARTS: dict[str, tuple[Any, object]] = {
    "train.betas": ([0.5, 1.5], 1.5),
    "model.block_out_channels": ([8, 0], 0),
    "loss.balance.shares": ({"pixel": -1.0}, -1.0),
    "loss.pretrained.layers": ([-1], -1),
}


def with_value(config: Any, name: str, value: Any) -> Any:
    """The configuration with another value of a field, by its dotted name."""
    first, _, rest = name.partition(".")
    if rest:
        value = with_value(getattr(config, first), rest, value)
    return replace(config, **{first: tuple(value) if isinstance(value, list) else value})


def refusal(line: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(["--data.path", "somewhere", *line])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=REFUSED)
def test_a_value_outside_its_range_is_refused_alike_through_every_door(tmp_path, name, value):
    from_flag = refusal([f"--{name}={value}"])
    assert from_flag.startswith(f"{name} is {value}; it must be a"), from_flag
    nested: Any = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(nested))
    assert refusal(["--config", str(recipe)]) == from_flag
    config = with_value(parse_config(["--data.path", "somewhere"]), name, value)
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert str(caught.value) == from_flag


@pytest.mark.parametrize(("name", "case"), IN_PARTS.items(), ids=IN_PARTS)
def test_a_part_outside_its_range_is_refused_by_the_field(name, case):
    value, wrong = case
    flag = yaml.safe_dump(value, default_flow_style=True).strip()
    assert refusal([f"--{name}={flag}"]).startswith(f"{name} has {wrong}, which is no ")
    config = with_value(parse_config(["--data.path", "somewhere"]), name, value)
    with pytest.raises(ConfigError, match=f"^{name} is "):
        check(config)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("loss.adversarial.kind", "hinge2", "choice of hinge, wasserstein"),
        ("train.batch_size", 1.5, "int above 0"),
        ("train.batch_size", True, "int above 0"),
        ("data.flip", 1, "bool"),
        ("output_dir", 3, "str"),
        ("train.betas", (0.5,), "list of 2"),
    ],
)
def test_what_python_sets_is_of_the_field_s_type(name, value, words):
    config = with_value(Config(), name, value)
    assert [words in line for line in misfits(config)] == [True]


def test_values_are_ordinary_numbers():
    config = parse_config(["--data.path", "x", "--loss.learned.layer_weights", "[1, 2, 3, 4]"])
    for value in (config.seed, config.data.resolution, *config.model.block_out_channels):
        assert type(value) is int
    for value in (config.train.clip_norm, *config.train.betas):
        assert type(value) is float
    assert [type(w) for w in config.loss.learned.layer_weights] == [float] * 4
    assert plain({"a": [1, None, "x"]}) == {"a": [1, None, "x"]}


def test_fields_and_sections_that_may_change_are_said_at_the_field():
    names = set(changeable(Config))
    assert {"train.learning_rate", "data.path", "critic.learning_rate", "validation"} <= names
    assert names.isdisjoint({"seed", "train.batch_size", "train.betas", "loss.kl_weight", "data"})
