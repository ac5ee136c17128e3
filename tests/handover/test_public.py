"""What goes out with an export says nothing of the machine it was made on."""

import json
from pathlib import Path

import pytest
import yaml
from autoencoders import tiny_kl
from conftest import arguments, picture

from first_stage.config import parse_config
from first_stage.handover.public import public_config, public_name
from first_stage.models.loading import load_autoencoder, training_resolution
from first_stage.training.loop import train


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/secret/photos/", "photos"),
        ("data/../photos", "photos"),
        ("s3://bucket-of-ours/private/shards", "shards"),
        ("https://user:word@host/data/train.tar?token=abc", "train.tar"),
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("photos", "photos"),
        ("/", "data"),
    ],
)
def test_names_are_public_and_places_are_not(path, name):
    assert public_name(path) == name


def test_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "patients" / "scans").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("patients/scans") == "scans"


@pytest.fixture
def exported(tmp_path, images, monkeypatch) -> Path:
    """The export of a fine-tuned run whose paths are all absolute."""
    begun = tiny_kl()
    begun.register_to_config(force_upcast=True, sample_size=32)
    begun.save_pretrained(tmp_path / "begun")
    (tmp_path / "held").mkdir()
    picture(99).save(tmp_path / "held" / "a.png")
    fields = {"model.pretrained": tmp_path / "begun", "data.validation_path": tmp_path / "held"}
    train(parse_config(arguments(tmp_path / "run", images, **fields)))
    return tmp_path / "run" / "export"


def test_an_export_says_nothing_private(exported, tmp_path):
    for file in exported.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    card = (exported / "README.md").read_text()
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["data"]["path"] == "images"
    assert recipe["data"]["validation_path"] == "held"
    assert recipe["model"]["pretrained"] == "begun"
    assert recipe["output_dir"] == "run"
    # The recipe that the run itself keeps has them all.
    config = parse_config(["--config", str(exported.parent / "config.yaml")])
    assert config.data.path == str(tmp_path / "images")
    assert public_config(config).data.path == "images"


def test_what_a_first_stage_was_known_to_need_stays(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["force_upcast"] is True
    assert "`force_upcast` is true" in (exported / "README.md").read_text()


def test_the_tile_of_an_export_is_no_training_crop(exported):
    loaded = load_autoencoder(str(exported))
    assert loaded.config.sample_size == 512
    assert loaded.tile_sample_min_size == 512
    assert training_resolution(str(exported), loaded) == 16
