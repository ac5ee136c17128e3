"""Going on: exactly where an undisturbed run would be, or not at all."""

import copy
import hashlib
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from autoencoders import tiny_kl
from conftest import arguments, picture

from first_stage.config import Config, parse_config, to_dict
from first_stage.config.sections import with_sections
from first_stage.data import fingerprint, open_source
from first_stage.errors import UserError
from first_stage.training import checkpoint
from first_stage.training.checkpoint import Snapshot
from first_stage.training.loop import train
from first_stage.training.resume import MAY_CHANGE, changed_fields, check_resumable, differences
from first_stage.training.step import Trainer

STEPS = 7
FIELDS = {
    "train.max_steps": STEPS,
    "train.micro_batch_size": 2,
    "train.log_every": 3,
    "train.checkpoint_every": 100,
    "train.warmup_steps": 2,
    "train.decay_steps": 3,
    "train.ema_decay": 0.9,
    "validation.every": 2,
}


def train_until(config: Config, step: int | None):
    """Train; a SIGTERM arrives while the step after so many is computed."""
    original = Trainer.training_step

    def training_step(trainer, done, batches):
        original(trainer, done, batches)
        if done + 1 == step:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Trainer, "training_step", training_step):
        return train(config)


def contents(folder: Path) -> dict[str, str]:
    """Path to hash, of every file of a run."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


@pytest.fixture
def fields(images) -> dict[str, object]:
    (images / "05-broken.png").write_bytes(b"not a picture")
    return {**FIELDS, "data.max_broken": 0.5}


def test_n_and_n_steps_are_2n_bit_for_bit(tmp_path, images, fields, monkeypatch):
    """Weights, EMA, optimizers, log, GIF, pictures, broken files and export."""
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    assert train(parse_config(arguments("run", images, **fields))).finished

    monkeypatch.chdir(tmp_path / "stopped")
    stopped = train_until(parse_config(arguments("run", images, **fields)), 4)
    assert (stopped.finished, stopped.step) == (False, 4)
    again = parse_config(["--config", "run/config.yaml", "--resume", "latest"])
    assert train(again).finished

    expected = contents(tmp_path / "undisturbed" / "run")
    found = contents(tmp_path / "stopped" / "run")
    extra = {name for name in found if "step-000004/" in name}
    assert extra  # the checkpoint of the stop
    assert {n: h for n, h in found.items() if n not in extra} == expected
    for name in ("log.jsonl", "training.gif", "broken_files.jsonl", "pictures/step-000004.png"):
        assert name in expected
    assert f"checkpoints/step-{STEPS:06d}/optimizers.safetensors" in expected


@pytest.mark.parametrize("stop", [2, 5])
def test_it_goes_on_the_same_before_and_within_larger_crops(
    tmp_path, images, fields, monkeypatch, stop
):
    fields = {
        **fields,
        "data.resize": 0,
        "data.least_scale": 0.8,
        "data.jitter_saturation": 0.5,
        "data.late_resolution": 20,
        "data.late_steps": 4,
        "disturb.noise.probability": 0.5,
    }
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    train(parse_config(arguments("run", images, **fields)))
    monkeypatch.chdir(tmp_path / "stopped")
    assert train_until(parse_config(arguments("run", images, **fields)), stop).step == stop
    train(parse_config(["--config", "run/config.yaml", "--resume", "latest"]))
    expected, found = (contents(tmp_path / name / "run") for name in ("undisturbed", "stopped"))
    assert {n: h for n, h in found.items() if f"step-{stop:06d}/" not in n} == expected


def test_a_run_cut_off_before_its_export_only_exports(tmp_path, images, fields, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(arguments("run", images, **fields))
    train(config)
    expected = contents(tmp_path / "run")
    shutil.rmtree("run/export")
    (tmp_path / "run" / ".tmp-12345678-export").mkdir()
    train(parse_config(["--config", "run/config.yaml", "--resume", "latest"]))
    assert contents(tmp_path / "run") == expected
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_a_run_cut_off_before_its_first_checkpoint_begins_anew(tmp_path, images, fields, capsys):
    config = parse_config(arguments(tmp_path / "run", images, **fields))
    train(config)
    expected = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(parse_config(arguments(tmp_path / "run", images, **fields, resume="latest")))
    assert "no checkpoint" in capsys.readouterr().out
    assert contents(tmp_path / "run") == expected


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    tmp_path, images, fields, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    fields = fields | {"train.checkpoint_every": 3, "train.keep_checkpoints": 10}
    train(parse_config(arguments("run", images, **fields)))
    expected = contents(tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-000007" / "first_stage.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    weights.write_bytes(data)
    capsys.readouterr()
    train(parse_config(["--config", "run/config.yaml", "--resume", "latest"]))
    told = capsys.readouterr().out
    assert "first_stage.safetensors differs from its checksum; falling back" in told
    assert "resuming at step 6" in told
    found = contents(tmp_path / "run")
    aside = {n: h for n, h in found.items() if "set-aside-step-000007" in n}
    assert hashlib.sha256(data).hexdigest() in aside.values()  # moved, not deleted
    assert {n: h for n, h in found.items() if n not in aside} == expected


def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(
    tmp_path, images, fields, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fields = fields | {"train.checkpoint_every": 2, "train.keep_checkpoints": 10}
    train(parse_config(arguments("run", images, **fields)))
    early = "run/checkpoints/step-000002"
    stopped = train_until(parse_config(["--config", "run/config.yaml", "--resume", early]), 3)
    assert stopped.step == 3
    names = {p.name for p in Path("run/checkpoints").iterdir()}
    assert {n for n in names if n.startswith("step")} == {"step-000002", "step-000003"}
    assert "set-aside-step-000006" in names
    # What comes next goes on from the new step 3, not from the abandoned step 7.
    outcome = train(parse_config(["--config", "run/config.yaml", "--resume", "latest"]))
    assert outcome.finished


def test_changed_fields_are_printed_and_the_others_refused_by_name(
    tmp_path, images, fields, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    train_until(parse_config(arguments("run", images, **fields)), 3)
    resume = ["--config", "run/config.yaml", "--resume", "latest"]
    refused = [
        *("--loss.kl_weight", "0.5", "--train.batch_size", "8"),
        *("--train.learning_rate", "2e-3"),
    ]
    before = contents(tmp_path / "run")
    with pytest.raises(UserError) as error:
        train(parse_config(resume + refused))
    text = str(error.value)
    assert "loss.kl_weight (1e-06 -> 0.5)" in text
    assert "train.batch_size (4 -> 8)" in text
    assert "learning_rate" not in text
    assert "\n" not in text
    assert contents(tmp_path / "run") == before

    capsys.readouterr()
    allowed = ["--train.max_steps", "5", "--train.learning_rate", "2e-3"]
    assert train(parse_config(resume + allowed)).step == 5
    told = capsys.readouterr().out
    assert "  train.max_steps (7 -> 5)" in told
    assert "  train.learning_rate (0.001 -> 0.002)" in told

    with pytest.raises(UserError, match=r"train\.max_steps \(4\) is below the 5 steps"):
        train(parse_config([*resume, "--train.max_steps", "4", "--train.decay_steps", "0"]))


def test_a_data_set_that_changed_is_refused_in_words(tmp_path, images, fields, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_until(parse_config(arguments("run", images, **fields)), 3)
    before = contents(tmp_path / "run")
    resume = parse_config(["--config", "run/config.yaml", "--resume", "latest"])

    picture(77).save(images / "added.png")
    with pytest.raises(UserError, match="has changed since the checkpoint") as error:
        train(resume)
    assert "10 samples to train on then" in str(error.value)
    (images / "added.png").unlink()

    original = (images / "03.png").read_bytes()
    picture(78).save(images / "03.png")  # the same name, another picture
    with pytest.raises(UserError, match="has changed since the checkpoint"):
        train(resume)
    (images / "03.png").write_bytes(original)
    assert contents(tmp_path / "run") == before

    # The folder may move: what counts is what is in it.
    images.rename(tmp_path / "moved")
    moved = ["--resume", "latest", "--data.path", str(tmp_path / "moved")]
    assert train(parse_config(["--config", "run/config.yaml", *moved])).finished


def test_names_of_fields_that_may_change_are_fields():
    flat = differences_of_everything()
    for name in MAY_CHANGE:
        assert any(f == name or f.startswith(f"{name}.") for f in flat), name


def differences_of_everything() -> set[str]:
    """All dotted names, by comparing the defaults with a configuration where all differs."""

    def mangled(value):
        if isinstance(value, dict):
            return {k: mangled(v) for k, v in value.items()}
        return f"not {value!r}"

    plain = to_dict(Config())
    return set(differences(plain, mangled(plain)))


def test_fields_that_a_checkpoint_does_not_know_count_with_their_default():
    before = {"train": {"batch_size": 4}}
    defaults = {"train": {"batch_size": 32, "new": 1}, "group": None}
    same = {"train": {"batch_size": 4, "new": 1}, "group": None}
    assert changed_fields(before, same, defaults, "c") == ""
    other = {"train": {"batch_size": 4, "new": 2}, "group": None}
    with pytest.raises(UserError, match=r"train\.new \(1 -> 2\)"):
        changed_fields(before, other, defaults, "c")
    grown = {"train": {"batch_size": 4, "new": 1}, "group": {"x": 3}}
    with pytest.raises(UserError, match=r"group\.x \(null -> 3\)"):
        changed_fields(before, grown, defaults, "c")


def without(nested: dict, name: str) -> dict:
    """A configuration as it was before a field existed."""
    copied = copy.deepcopy(nested)
    *parents, last = name.split(".")
    section = copied
    for parent in parents:
        section = section[parent]
    del section[last]
    return copied


def test_whichever_field_a_checkpoint_lacks_its_default_counts():
    """Every field there is, mappings and lists too, one after the other."""
    kind = with_sections(Config)
    defaults = to_dict(kind())
    for name, value in flat_fields(defaults):
        if any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE):
            continue
        before = without(defaults, name)
        assert changed_fields(before, defaults, defaults, "c") == "", name
        now = copy.deepcopy(defaults)
        *parents, last = name.split(".")
        section = now
        for parent in parents:
            section = section[parent]
        section[last] = {"other": 1.0} if isinstance(value, dict) else f"not {value!r}"
        with pytest.raises(UserError, match=re.escape(f"{name} (")):
            changed_fields(before, now, defaults, "c")


def flat_fields(nested: dict, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            found += flat_fields(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


def test_mappings_are_compared_whole():
    defaults = to_dict(Config())
    weights = {**defaults, "loss": {**defaults["loss"], "penalties": {"a": 1.0, "b": 2.0}}}
    fewer = {**defaults, "loss": {**defaults["loss"], "penalties": {"a": 1.0}}}
    for before, now in ((defaults, fewer), (fewer, defaults), (weights, fewer), (fewer, weights)):
        with pytest.raises(UserError, match=r"loss\.penalties"):
            changed_fields(before, now, defaults, "c")
    assert changed_fields(weights, weights, defaults, "c") == ""


def test_lists_and_tuples_are_the_same():
    assert differences({"a": [1, 2]}, {"a": (1, 2)}) == {}


@pytest.fixture
def pretrained(tmp_path):
    """A first stage to begin from; no field of the recipe's layout fits it."""
    folder = tmp_path / "pretrained"
    tiny_kl(latent_channels=2, levels=3, attention=True).save_pretrained(folder)
    return folder


def test_a_fine_tuned_run_goes_on_without_what_it_began_from(
    tmp_path, images, fields, pretrained, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fields = {**fields, "model.pretrained": pretrained}
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    train(parse_config(arguments("run", images, **fields)))
    monkeypatch.chdir(tmp_path / "stopped")
    train_until(parse_config(arguments("run", images, **fields)), 3)

    kept = pretrained.rename(tmp_path / "moved")
    resume = ["--config", "run/config.yaml", "--resume", "latest"]
    assert train_until(parse_config(resume), 5).step == 5
    # Under another path it is compared by its weights; the recipe as it was written will do too.
    again = arguments("run", images, **{**fields, "model.pretrained": kept}, resume="latest")
    assert train(parse_config(again)).finished
    expected = contents(tmp_path / "undisturbed" / "run" / "export")
    found = contents(tmp_path / "stopped" / "run" / "export")
    expected.pop("README.md"), found.pop("README.md")  # they name what it began from
    assert found == expected


def test_an_inflated_run_knows_its_renamed_beginning(
    tmp_path, images, fields, pretrained, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fields = {**fields, "model.pretrained": pretrained, "model.in_channels": 4,
              "model.inflate_channels": "true", "model.more_latent_channels": 1,
              "model.scaling_factor": 0.5}  # fmt: skip
    train_until(parse_config(arguments("run", images, **fields)), 3)
    fields["model.pretrained"] = pretrained.rename(tmp_path / "moved")
    assert train(parse_config(arguments("run", images, **fields, resume="latest"))).finished
    other = tiny_kl(latent_channels=2, levels=3, attention=True)
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    fields["model.pretrained"] = tmp_path / "other"
    with pytest.raises(UserError, match=r"trained from other weights than model.pretrained"):
        train(parse_config(arguments("run", images, **fields, resume="latest")))


def test_other_weights_to_begin_from_are_refused(tmp_path, images, fields, pretrained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {**fields, "model.pretrained": pretrained}
    train_until(parse_config(arguments("run", images, **fields)), 3)
    other = tiny_kl(latent_channels=2, levels=3, attention=True)
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    resume = ["--config", "run/config.yaml", "--resume", "latest", "--model.pretrained"]
    with pytest.raises(UserError, match=r"trained from other weights than model.pretrained"):
        train(parse_config([*resume, str(tmp_path / "other")]))
    with pytest.raises(UserError, match=r"cannot be compared: .*does not exist.* put .* back"):
        train(parse_config([*resume, str(tmp_path / "nowhere")]))
    with pytest.raises(UserError, match=r"other values of model.pretrained"):
        train(parse_config([*resume, "null"]))


def test_the_recipe_of_a_fine_tuned_run_has_the_loaded_layout(
    tmp_path, images, fields, pretrained, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train(parse_config(arguments("run", images, **{**fields, "model.pretrained": pretrained})))
    written = yaml.safe_load(Path("run/config.yaml").read_text())["model"]
    assert written["latent_channels"] == 2
    assert written["block_out_channels"] == [8, 16, 16]
    assert written["mid_block_attention"] is True
    assert "latent_channels: 2\n" in Path("run/export/README.md").read_text()


def test_the_average_lies_in_memory_as_the_weights_do(tmp_path, images, fields, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def look(trainer, step, batches, original=Trainer.training_step):
        pairs = zip(
            trainer.ema.shadow_params, trainer.first_stage.network.parameters(), strict=True
        )
        seen.append([a.stride() == w.stride() for a, w in pairs])
        original(trainer, step, batches)

    train_until(parse_config(arguments("run", images, **fields)), 3)
    with mock.patch.object(Trainer, "training_step", look):
        train(parse_config(["--config", "run/config.yaml", "--resume", "latest"]))
    assert seen
    assert all(map(all, seen))


def test_a_checkpoint_is_hashed_once(tmp_path, images, fields, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_until(parse_config(arguments("run", images, **fields)), 3)
    hashed = []
    original = checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda file: hashed.append(file) or original(file))
    train_until(parse_config(["--config", "run/config.yaml", "--resume", "latest"]), 4)
    before = [str(file) for file in hashed if "step-000003" in str(file)]
    assert len(before) == len(set(before)) > 4


def of_version_0_1(config: Config, **changes) -> Snapshot:
    """A checkpoint as the first version wrote it: other fingerprints, fewer fields."""
    saved = to_dict(config)
    del saved["data"]["color"], saved["model"]["family"], saved["train"]["profile_steps"]
    source = open_source(config.data.path)
    digest = hashlib.sha256(b"".join(source.id(k).encode() + b"\n" for k in range(len(source))))
    for k in range(len(source)):
        digest.update(hashlib.sha256(Path(source.read(k).image).read_bytes()).digest())
    state = {"config": saved, "samples": len(source), "data_fingerprint": digest.hexdigest()[:16]}
    return Snapshot(1, {}, state | changes)


def test_a_checkpoint_of_the_first_version_goes_on(tmp_path, images, fields):
    config = parse_config(arguments(tmp_path, images, **fields, data__color="keep"))
    source = open_source(config.data.path)
    known = {"checkpoint": "c", "fingerprint": fingerprint(source), "source": source}
    assert check_resumable(config, of_version_0_1(config), **known) == ""
    with pytest.raises(UserError, match="has changed"):
        check_resumable(config, of_version_0_1(config, data_fingerprint="0" * 16), **known)
    # It took the numbers in files as they are; profiles are converted by default since then.
    converted = parse_config(arguments(tmp_path, images, **fields))
    with pytest.raises(UserError, match=r'data.color \("keep" -> "srgb"\)'):
        check_resumable(converted, of_version_0_1(converted), **known)
