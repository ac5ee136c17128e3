"""A new run from a whole checkpoint of another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from autoencoders import tiny_kl
from conftest import arguments, picture
from equality import RECORDING, check_equal, line
from launching import run
from recording import record
from safetensors.torch import load_file
from stepping import make_trainer
from test_resume import contents, train_until

from first_stage.config import parse_config
from first_stage.data import StepSampler
from first_stage.errors import UserError
from first_stage.models.loading import load_autoencoder
from first_stage.training.checkpoint import read_checkpoint
from first_stage.training.data import open_data, open_loader, open_stream
from first_stage.training.loop import train
from first_stage.training.start_from import Origin, carry_over

SOURCE = {"train.max_steps": 3, "train.ema_decay": 0.9, "train.micro_batch_size": 2}
THEN = {**SOURCE, "train.max_steps": 4, "train.warmup_steps": 2, "train.checkpoint_every": 1,
        "train.keep_checkpoints": 9}  # fmt: skip
CHECKPOINT = "source/checkpoints/step-000003"


@pytest.fixture
def source(tmp_path, images, monkeypatch) -> Path:
    """A finished run of three steps; then other pictures."""
    monkeypatch.chdir(tmp_path)
    train(parse_config(arguments("source", images, **SOURCE)))
    more = tmp_path / "more"
    more.mkdir()
    for index in range(20):
        picture(index, seed := 24, seed).save(more / f"{index:02d}.png")
    return more


def test_the_first_step_is_that_of_a_continuation_made_by_hand(source, capsys):
    """Both players' gradients of other data, by AdamW with the old moments, averaged further."""
    config = parse_config(arguments("new", source, **THEN, start_from=CHECKPOINT))
    train(config)
    told = capsys.readouterr().out
    assert "starting from step 3 of source/checkpoints/step-000003: weights, their average" in told
    for name in ("critic", "first stage's optimizer", "critic's optimizer", "the balance's means"):
        assert name in told.split(" go on;")[0]

    before = read_checkpoint(Path(CHECKPOINT))
    trainer = make_trainer(config)  # other random weights, nothing of the checkpoint
    trainer.restore(before, load_autoencoder(f"{CHECKPOINT}/ema"))
    sizes = {"seed": config.seed, "batch_size": config.train.batch_size}
    data, _ = open_data(
        config.data, folder=Path("new"), processes=trainer.processes, say=print, **sizes
    )
    stream = open_stream(data, config.data, channels=3, **sizes)
    positions = StepSampler(config.train.batch_size, 2, range(1), 0, 1)
    batches = list(open_loader(stream, positions, workers=0, pin_memory=False))
    trainer.training_step(0, batches)  # step 0: half the learning rate, the first images
    by_hand = trainer.snapshot(1)
    found = read_checkpoint(Path("new/checkpoints/step-000001"))
    for name in ("first_stage", "critic", "optimizers"):
        assert set(found.tensors[name]) == set(by_hand.tensors[name])
        for key, value in by_hand.tensors[name].items():
            assert torch.equal(found.tensors[name][key], value), (name, key)
    means = {k for k in by_hand.tensors["means"] if k.startswith("objective.")}
    assert means == {k for k in found.tensors["means"] if k.startswith("objective.")}
    with trainer.averaged_model() as model:
        averaged = load_autoencoder("new/checkpoints/step-000001/ema").state_dict()
        assert all(torch.equal(v, averaged[k]) for k, v in model.state_dict().items())
    assert found.state["ema_steps"] == before.state["ema_steps"] + 1
    steps = {float(v) for k, v in found.tensors["optimizers"].items() if k.endswith("/step")}
    assert steps == {4.0}


def test_where_it_came_from_is_written_down(source):
    train(parse_config(arguments("new", source, **THEN, start_from=CHECKPOINT)))
    assert f"start_from: {CHECKPOINT}\n" in Path("new/config.yaml").read_text()
    state = json.loads(Path("new/checkpoints/step-000004/state.json").read_text())
    assert state["started_from"]["step"] == 3
    card = " ".join(Path("new/export/README.md").read_text().split())
    assert (
        f"began from step 3 of another run (checkpoint `{state['started_from']['sha256'][:16]}"
        in card
    )
    assert "start_from: step-000003" in card
    assert "source" not in card


def test_its_resume_is_exact_also_when_the_other_run_is_gone(source, tmp_path, monkeypatch):
    fields = {**THEN, "start_from": tmp_path / CHECKPOINT}
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        train_until(parse_config(arguments("run", source, **fields)),
                    2 if name == "stopped" else None)  # fmt: skip
    shutil.rmtree(tmp_path / "source")
    assert train(parse_config(["--config", "run/config.yaml", "--resume", "latest"])).finished
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")
    again = parse_config(arguments("run", source, **fields, resume="latest"))
    assert train(again).finished  # the command as it was, too


def test_what_does_not_fit_is_refused_in_one_line(source, images):
    def refused(match: str, **fields: object) -> None:
        with pytest.raises(UserError, match=match) as caught:
            train(
                parse_config(
                    arguments("new", source, **{**THEN, "start_from": CHECKPOINT, **fields})
                )
            )
        assert "\n" not in str(caught.value)
        assert not Path("new/checkpoints").exists()

    refused(
        r"model.block_out_channels \(\[8, 16\] -> \[8, 8\]\)", model__block_out_channels="[8,8]"
    )
    refused(r"critic.width \(4 -> 8\)", critic__width=8)
    refused("holds a whole model already", model__pretrained="somewhere")
    refused("is a run's folder: name one of its checkpoints", start_from="source")
    refused("there is no checkpoint", start_from="nowhere")
    refused("holds no original encoder", loss__original__weight=1.0)
    with pytest.raises(UserError, match="lies in output_dir"):
        parse_config(arguments("source", images, overwrite=True, start_from=CHECKPOINT))
    weights = Path(CHECKPOINT) / "critic.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    refused("critic.safetensors differs from its checksum")


@torch.no_grad()
def test_what_has_no_counterpart_begins_anew_and_is_said(source, capsys):
    config = parse_config(
        arguments("new", source, **THEN, start_from=CHECKPOINT, train__parts="[decoder]",
                  loss__pixel="l2", loss__learned__ema_decay=0.5)
    )  # fmt: skip
    trainer = make_trainer(config)
    told = carry_over(
        trainer, Origin(Path(CHECKPOINT), {**read_checkpoint(Path(CHECKPOINT)).state, "step": 3})
    )
    assert told.endswith("begin at 0, first stage's optimizer")
    assert "the balance's means" not in told
    assert not trainer.first_stage.optimizer.state
    critic, average = trainer.critic.network.state_dict(), trainer.critic_ema.state_dict()
    before = load_file(f"{CHECKPOINT}/critic.safetensors")
    assert all(torch.equal(critic[k], v) and torch.equal(average[k], v) for k, v in before.items())


def test_a_fine_tuned_run_hands_its_layout_and_origin_on(tmp_path, source, images):
    tiny_kl(latent_channels=2, levels=3).save_pretrained("before")
    fields = {**SOURCE, "model.pretrained": "before", "train.parts": "[decoder]",
              "model.inflate_channels": "true"}  # fmt: skip
    train(parse_config(arguments("fine", images, **fields)))
    shutil.rmtree("before")
    fine = "fine/checkpoints/step-000003"
    train(
        parse_config(
            arguments("decoder", source, **THEN, start_from=fine, train__parts="[decoder]")
        )
    )
    train(parse_config(arguments("all", source, **THEN, start_from=fine)))
    states = [
        json.loads(Path(f"{name}/checkpoints/step-00000{n}/state.json").read_text())
        for name, n in (("fine", 3), ("decoder", 4), ("all", 4))
    ]
    assert [state["keeps_latents"] for state in states] == [True, True, False]
    assert len({state["pretrained_fingerprint"] for state in states}) == 1
    assert states[1]["config"]["model"] == states[0]["config"]["model"]
    assert load_autoencoder("decoder/export").config.latent_channels == 2
    again = arguments("decoder", source, **THEN, start_from=fine, train__parts="[decoder]",
                      resume="latest")  # fmt: skip
    assert train(parse_config(again)).finished


def test_two_processes_start_as_one_does(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for index in range(17):
        picture(index).save(tmp_path / "images" / f"{index:02d}.png")
    train(parse_config(arguments(tmp_path / "source", tmp_path / "images", **SOURCE,
                                 **{"critic.layers": 2})))  # fmt: skip
    fields = {"start_from": tmp_path / CHECKPOINT}
    record(parse_config(line(tmp_path, "one", 2, **fields)), tmp_path / "record-one")
    run(
        *(2, RECORDING, tmp_path / "record-many", tmp_path / "one"),
        *line(tmp_path, "many", 3, **fields),
        output=tmp_path / "many.txt",
    )
    check_equal(tmp_path, "many", 2)
