"""What a run says before its first step, and what it shows before its last."""

import re

import numpy as np
import pytest
import torch
from conftest import TINY, arguments
from PIL import Image

from first_stage.commands.train import main, without_plan
from first_stage.models.bottlenecks import Gaussian, Plain
from first_stage.models.codebooks import Codebook
from first_stage.training import loop
from first_stage.training.introduction import Phase, draw_first_batch, phases
from first_stage.training.loop import train
from first_stage.training.plan import duration
from first_stage.training.step import Trainer

PHASED = {
    "critic__start_step": 2,
    "loss__learned__start_step": 3,
    "loss__adversarial__start_step": 3,
    "train__encoder_steps": 6,
    "train__max_steps": 8,
}


def test_phases(tiny):
    assert phases(tiny(**PHASED), Gaussian()) == [
        Phase(0, 2, "pixels and KL"),
        Phase(2, 3, "the critic learns"),
        Phase(3, 6, "the learned term, the adversarial term"),
        Phase(6, 8, "the decoder learns alone"),
    ]


def test_phases_of_pixels_alone(tiny):
    config = tiny(loss__learned__weight=0, loss__adversarial__weight=0, train__encoder_steps=0)
    said = "pixels and KL, the decoder learns alone from the start"
    assert phases(config, Gaussian()) == [Phase(0, int(TINY["train.max_steps"]), said)]


@pytest.mark.parametrize(("bottleneck", "changed", "said"), [
    (Gaussian(), {"loss__kl_weight": 0}, "pixels"),
    (Plain(), {}, "pixels"),
    (Plain(), {"loss__penalties": "{magnitude: 0.1}"}, "pixels and magnitude"),
    (Codebook(8, 4), {}, "pixels and codebook and commitment"),
    (Gaussian(), {"disturb__noise__probability": 0.5, "disturb__prefix__probability": 0.5},
     "pixels and KL, latents disturbed by noise and prefix"),
])  # fmt: skip
def test_what_a_run_begins_with_is_that_of_its_family(tiny, bottleneck, changed, said):
    config = tiny(loss__learned__weight=0, loss__adversarial__weight=0, **changed)
    assert phases(config, bottleneck) == [Phase(0, int(TINY["train.max_steps"]), said)]


def test_a_plan_tells_what_it_would_cost_and_leaves_no_run(tmp_path, images, capsys):
    (images / "broken.png").write_bytes(b"no image")
    (images / "notes.doc").write_bytes(b"no image either")
    line = arguments(
        tmp_path / "run",
        images,
        train__batch_size=12,
        data__validation_share=0,
        data__max_broken=0.5,
        **PHASED,
    )
    main([*line, "--plan", "true"])
    said = capsys.readouterr().out
    assert "13 images to train on, 0 held out" in said
    assert "images: 13 images\n  left out: 1 .doc: no known image format, such as notes.doc" in said
    assert "8 steps, 1.1 to an epoch: each image is seen 7.4 times" in said
    assert "the critic learns from 2;" in said
    assert "the decoder learns alone from 6" in said
    times = re.findall(r"^time +\S+ s for (\d) steps? of (\S+) s from step (\d) on", said, re.M)
    assert [(int(steps), int(start)) for steps, _, start in times] == [
        (2, 0), (1, 2), (3, 3), (2, 6)
    ]  # fmt: skip
    rate = float(re.search(r"([\d.,]+) images/s", said)[1].replace(",", ""))
    total = sum(int(steps) * float(seconds) for steps, seconds, _ in times)
    assert abs(rate - 8 * 12 / total) < 0.05 * rate  # seconds are printed with three digits
    assert re.search(
        r"left out +1 of 13 images that were looked at cannot be decoded, such as broken", said
    )
    assert re.search(r"memory +\d", said)
    left = {p.name for p in (tmp_path / "run").rglob("*.*") if p.is_file()}
    assert left == {"first-batch.png", "files.txt"}
    # What it says to start with starts, in the same folder.
    again = said.splitlines()[-1]
    assert "--plan" not in again
    main(line)
    assert (tmp_path / "run/export/config.json").exists()


def test_a_plan_leaves_a_run_as_it_is_and_says_how_to_replace_it(tmp_path, images, capsys):
    line = arguments(tmp_path / "run", images, train__max_steps=1)
    main(line)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    for _ in range(2):
        main([*line, "--seed", "1", "--plan", "true"])
        said = capsys.readouterr().out.splitlines()
        assert "run' holds a run, which is as it was" in said[-2]
        assert said[-1].endswith("--seed 1 --overwrite true")
        assert (tmp_path / "run/plan/pictures/first-batch.png").exists()
        assert {p: p.read_bytes() for p in before} == before
    main([*line, "--seed", "1", "--overwrite", "true"])
    assert not (tmp_path / "run/plan").exists()


def test_steps_of_larger_crops_are_timed_with_larger_crops(tmp_path, images, capsys, monkeypatch):
    line = arguments(
        tmp_path / "run", images, data__late_resolution=20, data__late_steps=3, **PHASED
    )
    seen = {}
    original = Trainer.training_step

    def training_step(trainer, step, batches):
        seen.setdefault(step, set()).update(batch.pixels.shape[1:3] for batch in batches)
        original(trainer, step, batches)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    main([*line, "--plan", "true"])
    assert "crops of 20 pixels from 5;" in capsys.readouterr().out
    assert {step: sides for step, sides in seen.items() if step < 5}
    for step, sides in seen.items():
        assert sides == {(20, 20) if step >= 5 else (16, 16)}, step


def test_a_command_line_without_its_plan():
    line = ["--config", "demo", "--seed", "1"]
    assert without_plan([*line[:2], "--plan", "true", *line[2:]]) == line
    assert without_plan(["--plan=true", *line]) == line
    assert without_plan(line) == line


def test_the_first_batch_is_drawn_as_it_is(tmp_path):
    pixels = torch.randint(0, 256, (10, 6, 5, 3), dtype=torch.uint8)
    draw_first_batch(pixels, tmp_path / "pictures/first.png")
    drawn = np.asarray(Image.open(tmp_path / "pictures/first.png"))
    assert drawn.shape == (2 * (6 + 4) + 4, 8 * (5 + 4) + 4, 3)
    assert (drawn[4:10, 4:9] == pixels[0].numpy()).all()
    assert (drawn[14:20, 13:18] == pixels[9].numpy()).all()
    assert (drawn[14:20, 22:] == 255).all()


def test_the_report_is_there_while_a_run_goes_on(tiny, tmp_path, monkeypatch):
    seen = []
    write = loop.write_report

    def looked_at(folder):
        text = write(folder).read_text()
        seen.append((len(list((folder / "pictures").glob("step-*"))), "Recipe" in text))

    monkeypatch.setattr(loop, "write_report", looked_at)
    train(tiny(validation__every=2))
    assert seen == [(1, True), (2, True), (3, True)]
    assert (tmp_path / "run/pictures/first-batch.png").exists()
    assert "The first crops" in (tmp_path / "run/report.html").read_text()


def test_durations():
    assert [duration(s) for s in (40, 89.6, 720, 5400, 12000, 3600 * 50)] == [
        "40 s", "90 s", "12 min", "1 h 30 min", "3 h 20 min", "2 days 2 h"
    ]  # fmt: skip
