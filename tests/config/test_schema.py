import dataclasses

import pytest
import yaml
from conftest import ROOT, arguments, run_script

from first_stage.config import Config, parse_config
from first_stage.config.checks import micro_batch_size
from first_stage.config.parsing import plain_parser
from first_stage.errors import ConfigError
from first_stage.training.loop import recipe


def fields_of(cls, prefix=""):
    for field in dataclasses.fields(cls):
        default = field.default_factory() if callable(field.default_factory) else None
        if dataclasses.is_dataclass(default):
            yield from fields_of(type(default), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_help_lists_every_field_with_its_meaning_and_default():
    result = run_script("scripts/train.py", "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for name in fields_of(Config):
        assert f"--{name} " in text, name
    for needed in ("nats per image", "in pixels", "default: 1e-06", "Images per update over all",
                   "type: int above 0, default: 32", "type: float above 0 | null",
                   "type: float of at least 0 and below 1, default: 0.05"):  # fmt: skip
        assert needed in text


def test_every_field_has_a_docstring():
    parser = plain_parser(None)
    parser.add_class_arguments(Config, nested_key=None, as_group=False)
    texts = {action.dest: action.help for action in parser._actions}
    for name in fields_of(Config):
        assert texts[name], name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid(path):
    line = ["--config", str(path), "--data.path", "somewhere"]
    if "inflate_channels: true" in path.read_text():
        line += ["--model.pretrained", "elsewhere"]
    assert parse_config(line).data.path == "somewhere"


def test_scientific_notation_is_a_float(tmp_path):
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text("data:\n  path: x\nloss:\n  kl_weight: 1e-6\n")
    assert parse_config(["--config", str(recipe_file)]).loss.kl_weight == 1e-6
    from_flag = parse_config(["--config", str(recipe_file), "--loss.kl_weight", "2e-6"])
    assert from_flag.loss.kl_weight == 2e-6


@pytest.mark.parametrize("where", ["yaml", "flag"])
def test_a_misspelt_key_is_refused_by_name(tmp_path, where):
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text("data:\n  path: x\nloss:\n  kl_wieght: 1e-6\n")
    line = ["--config", str(recipe_file)] if where == "yaml" else ["--loss.kl_wieght", "1e-6"]
    with pytest.raises(ConfigError, match="kl_wieght"):
        parse_config(line)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__path": ""}, ["data.path is empty"]),
        ({"data__resolution": 17}, ["data.resolution (17)", "factor (2)", "16 or 18"]),
        ({"validation__resolution": 19}, ["validation.resolution (19)", "18 or 20"]),
        (
            {"data__least_scale": 0.5},
            ["data.least_scale is 0.5", "resized to the crop's 16 pixels", "data.resize to 0"],
        ),
        (
            {"data__least_scale": 0.5, "data__resize": 0, "data__crop": "center"},
            ["data.least_scale is 0.5", "data.crop is center", "set it to random"],
        ),
        (
            {"data__least_scale": 0.5, "data__crop_shape": "[16, 32]"},
            ["data.least_scale is 0.5", "data.crop_shape [16, 32]"],
        ),
        (
            {"data__jitter_hue": 0.1, "model__in_channels": 1},
            ["data.jitter_hue is 0.1", "1 channels are not colors", "set it to 0"],
        ),
        (
            {"data__jitter_saturation": 0.5, "data__value_range": "[0, 4095]"},
            ["data.jitter_saturation is 0.5", "measurements"],
        ),
        ({"data__late_steps": 2}, ["data.late_steps is 2", "late_resolution", "set both"]),
        (
            {"data__late_resolution": 32},
            ["data.late_resolution is 32", "data.late_steps is 0", "of the 4 steps"],
        ),
        (
            {"data__late_resolution": 16, "data__late_steps": 2},
            ["data.late_resolution is 16", "larger than data.resolution (16)"],
        ),
        (
            {"data__late_resolution": 19, "data__late_steps": 2},
            ["data.late_resolution (19)", "factor (2)", "18 or 20"],
        ),
        (
            {"data__late_resolution": 32, "data__late_steps": 2, "data__crop_shape": "[16, 16]"},
            ["data.late_resolution is 32", "data.crop_shape [16, 16]"],
        ),
        ({"data__least_scale": 0}, ["data.least_scale is 0", "above 0, up to 1"]),
        ({"model__in_channels": 0}, ["model.in_channels is 0", "above 0"]),
        ({"model__norm_num_groups": 5}, ["model.norm_num_groups (5)", "width 8"]),
        ({"model__inflate_channels": True}, ["inflate_channels (true)", "add --model.pretrained"]),
        ({"model__more_latent_channels": 2}, ["more_latent_channels (2)", "--model.pretrained"]),
        ({"train__micro_batch_size": 3}, ["train.micro_batch_size (3)", "train.batch_size (4)"]),
        ({"train__learning_rate": -1}, ["train.learning_rate is -1", "above 0"]),
        ({"train__ema_decay": 1.0}, ["train.ema_decay is 1.0", "below 1"]),
        ({"critic__layers": 6}, ["critic.layers is 6", "1 to 5"]),
        (
            {"critic__start_step": 5000, "loss__learned__start_step": 5000},
            ["critic.start_step (5000) must be below train.max_steps (4)", "would never train"],
        ),
        (
            {"critic__start_step": 2},
            ["loss.learned.start_step (0) is before critic.start_step (2)"],
        ),
        (
            {"loss__adversarial__start_step": 9},
            ["loss.adversarial.start_step (9)", "would never enter"],
        ),
        ({"loss__learned__layers": "[7]"}, ["loss.learned.layers names layer 7"]),
        ({"train__warmup_steps": 3, "train__decay_steps": 3}, ["together exceed train.max_steps"]),
    ],
)
def test_what_cannot_work_is_refused_with_field_value_and_remedy(tmp_path, overrides, words):
    data = overrides.pop("data__path", "somewhere")
    with pytest.raises(ConfigError) as caught:
        parse_config(arguments(tmp_path, data, **overrides))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_recipe_that_is_written_reads_back_equal(tiny, tmp_path):
    config = tiny()
    file = tmp_path / "written.yaml"
    file.write_text(recipe(config))
    assert parse_config(["--config", str(file)]) == config
    assert "resume" in yaml.safe_load(file.read_text())


def test_the_global_batch_is_dealt_out_or_refused(tiny):
    config = tiny(train__batch_size=12, train__micro_batch_size=2)
    assert [micro_batch_size(config, world) for world in (1, 2, 3)] == [2, 2, 2]
    with pytest.raises(ConfigError, match=r"train.batch_size \(12\) cannot be dealt to 5 proc"):
        micro_batch_size(config, 5)
    with pytest.raises(ConfigError, match="choose a divisor of 3"):
        micro_batch_size(config, 4)


def test_nothing_scales_the_learning_rate(tiny):
    assert tiny(train__batch_size=12, train__micro_batch_size=2).train.learning_rate == 1e-3
