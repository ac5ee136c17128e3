import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import pictures_in, tiny_kl, tiny_vq
from logs import log_lines
from PIL import Image

from first_stage.data import open_source
from first_stage.errors import UserError
from first_stage.evaluation import EvaluationImages, Options, evaluate, save
from first_stage.report import write_report


class Page(HTMLParser):
    """What is in a report: tags, texts, and whether tags are closed in order."""

    VOID = frozenset(["meta", "img", "link", "input", "br", "hr"])

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture
def run(tmp_path) -> Path:
    """A training run's folder, as far as the report reads it."""
    folder = tmp_path / "my <run>"
    (folder / "pictures").mkdir(parents=True)
    (folder / "log.jsonl").write_text(log_lines())
    (folder / "config.yaml").write_text(
        "seed: 7\ndata:\n  path: photos & more\nloss:\n  kl_weight: 1.0e-06\n"
        "  learned:\n    weight: 1.0\n"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "pictures/step-000010.png")
    Image.fromarray(pixels).save(folder / "pictures/step-000040.png")
    Image.fromarray(pixels).save(folder / "training.gif")
    return folder


def evaluation_of(folder: Path, tmp_path: Path, both: bool = False) -> None:
    images = EvaluationImages(open_source(str(pictures_in(tmp_path, 6))), 3)
    stages = [("first", tiny_kl())] + ([("second <b>", tiny_vq())] if both else [])
    save(evaluate(stages, images, Options(pairs=4)), folder)


def test_run_without_evaluation(run) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text())
    assert page.open == []
    assert "Training run: my <run>" in page.text
    assert "Originals over reconstructions at step 40" in page.text
    titles = [a.get("aria-label") for a in page.all("svg")]
    expected = ["PSNR (dB)", "Pixel", "KL (nats per image)", "Gradient share", "Real logit"]
    assert [t for t in titles if t in expected] == expected
    assert "loss.learned.weight" in page.text  # the recipe
    assert "photos & more" in page.text


def test_run_with_evaluation(run, tmp_path) -> None:
    evaluation_of(run / "evaluation", tmp_path)
    page = Page(write_report(run).read_text())
    assert page.open == []
    sections = [a["id"] for a in page.all("section")]
    assert sections == [
        *("summary", "pairs", "training", "spectra", "latents", "artifacts", "images", "recipe")
    ]
    links = [a["href"] for a in page.all("a")]
    assert links == [f"#{s}" for s in sections]
    stage = json.loads((run / "evaluation/metrics.json").read_text())["first_stages"][0]
    health = stage["latent_health"]
    for figure in (
        f"{health['spectrum']['slope']:.2f} (images: {stage['sharpness']['slope']:.2f})",
        f"{health['redundancy']:.0%}",
        f"{health['equivariance']['scale_0.5']['psnr_to_image']:.2f} dB",
        f"{health['channels'][0]['variance_share']:.1%}",
        "channels with half of the variance",
    ):
        assert figure in page.text


def test_comparison_of_two(tmp_path) -> None:
    folder = tmp_path / "out"
    evaluation_of(folder, tmp_path, both=True)
    text = write_report(folder).read_text()
    page = Page(text)
    assert page.open == []
    sections = [a["id"] for a in page.all("section")]
    assert sections == [
        *("summary", "comparison", "pairs", "spectra", "latents", "codes", "artifacts", "images")
    ]
    assert "second <b>" in page.text  # escaped, so it is text
    pairs = [a for a in page.all("figure") if (a.get("class") or "").startswith("pair")]
    assert len(pairs) == 4
    psnr = [json.loads((folder / "metrics.json").read_text())["first_stages"][k]["per_image"]
            for k in range(2)]  # fmt: skip
    for figure in pairs:
        index = int(figure["data-order"])
        shown = [float(v) for v in figure["data-psnr"].split()]
        assert shown == pytest.approx([psnr[k][index]["psnr"] for k in range(2)], abs=1e-4)


def test_nothing_is_loaded_from_elsewhere(run, tmp_path) -> None:
    evaluation_of(run / "evaluation", tmp_path)
    text = write_report(run).read_text()
    page = Page(text)
    sources = [a["src"] for a in page.all("img")]
    assert sources
    assert all(s.startswith("data:image/") for s in sources)
    assert all(a["href"].startswith(("#", "data:")) for a in [*page.all("a"), *page.all("link")])
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", text)
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; img-src data:")


def test_pictures_are_the_pixels_themselves(tmp_path) -> None:
    folder = tmp_path / "out"
    images = EvaluationImages(open_source(str(pictures_in(tmp_path, 3))), 3)
    save(evaluate([("first", tiny_kl())], images, Options(pairs=3)), folder)
    page = Page(write_report(folder).read_text())
    original = next(a for a in page.all("img") if a["alt"] == "original of 01.png")
    content = base64.b64decode(original["src"].partition("base64,")[2])
    (tmp_path / "shown.png").write_bytes(content)
    shown = np.asarray(Image.open(tmp_path / "shown.png"))
    np.testing.assert_array_equal(shown, np.asarray(Image.open(tmp_path / "pictures/01.png")))
    assert (original["width"], original["height"]) == (str(shown.shape[1]), str(shown.shape[0]))


def test_many_channels_and_no_posterior(tmp_path) -> None:
    folder = tmp_path / "out"
    images = EvaluationImages(open_source(str(pictures_in(tmp_path, 3))), 3)
    stages = [("wide", tiny_kl(latent_channels=40)), ("vq", tiny_vq())]
    save(evaluate(stages, images, Options(pairs=2)), folder)
    page = Page(write_report(folder).read_text())
    assert "All 40 channels" in page.text
    assert "this first stage has no posterior" in page.text


def test_killed_and_resumed_logs(run) -> None:
    # A line was half written when the run was killed; the resumed run wrote steps 39 and 40 again.
    again = "".join(json.dumps({"step": s, "loss/pixel": 7.0}) + "\n" for s in (39, 40))
    (run / "log.jsonl").write_text(log_lines() + again + '{"step": 41, "loss/pi')
    text = write_report(run).read_text()
    chart = next(p for p in text.split('data-chart="')[1:] if "&quot;Pixel&quot;" in p)
    points = json.loads(chart[: chart.index('"')].replace("&quot;", '"'))["series"][0]["points"]
    assert points[-2:] == [[39.0, 7.0], [40.0, 7.0]]
    assert len(points) == 40


def test_damaged_files_are_named(run, tmp_path) -> None:
    lines = log_lines().splitlines()
    (run / "log.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]))
    with pytest.raises(UserError, match=r"line 2 of .*log\.jsonl"):
        write_report(run)
    (run / "log.jsonl").write_text(log_lines())
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_report(run)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="neither a training run"):
        write_report(empty)


def test_an_empty_log_and_values_that_are_no_numbers(run) -> None:
    (run / "log.jsonl").write_text("")
    assert "The log has no values yet" in write_report(run).read_text()
    (run / "log.jsonl").write_text('{"step": 1, "loss/pixel": NaN, "note": "x"}\n')
    assert Page(write_report(run).read_text()).open == []


def test_identical_reconstructions_are_shown_as_such(tmp_path) -> None:
    folder = tmp_path / "out"
    images = EvaluationImages(open_source(str(pictures_in(tmp_path, 3))), 3)
    result = evaluate([("first", tiny_kl())], images, Options(pairs=3))
    row = result.first_stages[0]["per_image"][0]
    row |= {"mse": 0.0, "psnr": None, "identical": True, "ssim": 1.0}
    save(result, folder)
    page = Page(write_report(folder).read_text())
    assert "identical" in page.text
    assert any((a.get("data-psnr") or "") == "999" for a in page.all("figure"))


def test_the_seeds_of_torch_are_left_alone(tmp_path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluation_of(tmp_path / "out", tmp_path)
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())


def test_codes_are_told_drawn_and_mapped(tmp_path) -> None:
    """Of the first stage that has some, at its place among the two."""
    folder = tmp_path / "out"
    evaluation_of(folder, tmp_path, both=True)
    codes = json.loads((folder / "metrics.json").read_text())["first_stages"][1]["codes"]
    shares = [share for _, share in codes["by_use"]]
    assert len(shares) == codes["count"] == 16
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    text = write_report(folder).read_text()
    section = text[text.index('<section id="codes">') :].split("</section>")[0]
    page = Page(section + "</section>")
    dead = sum(share == 0 for share in shares)
    assert f"These images use {1 - dead / 16:.1%} of the 16 codes ({dead} are not" in page.text
    sources = [a["src"] for a in page.all("img")]
    files = [folder / "pairs/codes-1.png", *sorted((folder / "pairs").glob("*-tokens-1.png"))]
    assert len(files) == 1 + 4
    for file in files:
        assert sources.count(
            f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
        )
    assert not list((folder / "pairs").glob("*-tokens-0.png"))
