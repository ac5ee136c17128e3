"""The report in a real browser: what is drawn, what moves, and that nothing complains."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import pictures_in, tiny_kl, tiny_vq
from browser import Browser, find_chromium
from logs import log_lines
from PIL import Image

from first_stage.data import open_source
from first_stage.evaluation import EvaluationImages, Options, evaluate, evaluate_change, save
from first_stage.report import write_report

pytestmark = pytest.mark.skipif(
    find_chromium() is None,
    reason="no chromium here; apt-get install chromium to run this",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report with everything: a run, and two first stages compared."""
    parent = tmp_path_factory.mktemp("report")
    folder = parent / "run"
    images = EvaluationImages(open_source(str(pictures_in(parent, 6))), 3)
    save(evaluate([("one", tiny_kl()), ("two", tiny_vq())], images, Options(pairs=6)), folder)
    (folder / "log.jsonl").write_text(log_lines())
    return write_report(folder)


@pytest.fixture(scope="module")
def browser():
    with Browser() as page:
        yield page


@pytest.fixture
def page(browser, report) -> Browser:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(report)
    return browser


def box(page: Browser, selector: str) -> dict[str, float]:
    """Place of an element in the window, after scrolling to it."""
    return page.evaluate(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView("
        "{block: 'center'}); const b = e.getBoundingClientRect(); "
        "return {x: b.x, y: b.y, width: b.width, height: b.height}; })()"
    )


def pixels(page: Browser, tmp_path: Path, place: dict[str, float]) -> np.ndarray:
    page.screenshot(tmp_path / "window.png", whole=False)
    x, y = round(place["x"]), round(place["y"])
    with Image.open(io.BytesIO((tmp_path / "window.png").read_bytes())) as window:
        cut = window.convert("RGB").crop(
            (x, y, x + round(place["width"]), y + round(place["height"]))
        )
        return np.asarray(cut, dtype=np.float64)


def reconstruction_at_left(page: Browser, tmp_path: Path) -> np.ndarray:
    """The left quarter of the first pair as it is drawn, away from its label and handle."""
    place = box(page, ".pair .views")
    drawn = pixels(page, tmp_path, place)
    height, width = drawn.shape[:2]
    return drawn[height // 2 : -8, 8 : width // 4]


def test_no_errors_and_no_requests(page, report) -> None:
    assert page.errors == []
    assert page.requests == [report.as_uri()]


def test_every_picture_is_decoded(page) -> None:
    broken = page.evaluate(
        "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    )
    assert broken == 0
    assert page.evaluate("document.images.length") > 12


def test_dragging_the_picture_moves_the_slider_and_the_wipe(page, tmp_path) -> None:
    before = reconstruction_at_left(page, tmp_path)
    place = box(page, ".pair .views")
    middle = place["y"] + place["height"] / 2
    start = (place["x"] + place["width"] / 2, middle)
    page.drag(start, (place["x"] + 0.1 * place["width"], middle))
    value = float(page.evaluate("document.querySelector('.pair input.wipe').value"))
    assert value == pytest.approx(10, abs=1)
    after = reconstruction_at_left(page, tmp_path)
    assert np.abs(after - before).mean() > 3  # what was original is reconstruction now
    page.drag((place["x"] + 0.1 * place["width"], middle), (place["x"] + place["width"], middle))
    assert float(page.evaluate("document.querySelector('.pair input.wipe').value")) == 100
    np.testing.assert_array_equal(reconstruction_at_left(page, tmp_path), before)
    assert page.errors == []


def test_the_range_input_moves_the_wipe(page) -> None:
    page.evaluate(
        "(() => { const i = document.querySelector('.pair input.wipe'); i.value = 80; "
        "i.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    cut = "document.querySelector('.pair').style.getPropertyValue('--cut')"
    assert page.evaluate(cut) == "80%"
    clip = "getComputedStyle(document.querySelector('.pair .reconstruction.chosen')).clipPath"
    assert "80%" in page.evaluate(clip)


def click(page: Browser, selector: str) -> None:
    page.evaluate(f"document.querySelector({selector!r}).click()")


def test_difference_is_black_where_nothing_differs(page, tmp_path) -> None:
    click(page, "[data-mode=difference]")
    # Show the original against itself: the difference of equal pictures is black.
    page.evaluate(
        "document.querySelector('.pair .reconstruction.chosen img').src = "
        "document.querySelector('.pair .original img').src"
    )
    assert reconstruction_at_left(page, tmp_path).max() <= 1
    click(page, "[data-mode=side]")
    assert (
        page.evaluate(
            "[...document.querySelectorAll('.pair')[0].querySelectorAll('.view')]"
            ".filter(v => v.offsetWidth > 0).length"
        )
        == 2
    )
    assert page.errors == []


def test_sorting_and_choosing_a_first_stage(page) -> None:
    listed = "[...document.querySelectorAll('.pair')].map(p => p.dataset.psnr)"
    click(page, "[data-sort=worst]")
    first = [float(v.split()[0]) for v in page.evaluate(listed)]
    assert first == sorted(first)
    click(page, "[data-stage='1']")
    second = [float(v.split()[1]) for v in page.evaluate(listed)]
    assert second == sorted(second)
    click(page, "[data-sort=best]")
    assert [float(v.split()[1]) for v in page.evaluate(listed)] == second[::-1]
    click(page, "[data-sort=data]")
    order = page.evaluate("[...document.querySelectorAll('.pair')].map(p => +p.dataset.order)")
    assert order == sorted(order)
    chosen = "document.querySelector('.pair .reconstruction.chosen').dataset.stage"
    assert page.evaluate(chosen) == "1"
    pressed = "document.querySelector(\"[data-stage='1']\").getAttribute('aria-pressed')"
    assert page.evaluate(pressed) == "true"


def test_zoom_opens_grows_and_closes(page) -> None:
    click(page, ".pair .zoom")
    width = "document.querySelector('dialog .pair img').getBoundingClientRect().width"
    natural = page.evaluate("document.querySelector('dialog .pair img').naturalWidth")
    assert page.evaluate(width) == pytest.approx(16 * natural, abs=1)
    page.evaluate("document.querySelectorAll('dialog .bar button')[1].click()")
    assert page.evaluate(width) == pytest.approx(2 * natural, abs=1)
    page.evaluate("[...document.querySelectorAll('dialog .bar button')].pop().click()")
    assert page.evaluate("document.querySelectorAll('dialog[open]').length") == 0
    assert page.errors == []


def test_charts_tell_values_under_the_pointer(page) -> None:
    place = box(page, "#training figure.chart svg")
    page.call(
        "Input.dispatchMouseEvent", type="mouseMoved",
        x=place["x"] + place["width"] * 0.6, y=place["y"] + place["height"] / 2,
    )  # fmt: skip
    text = page.evaluate("document.querySelector('#training figure.chart output').textContent")
    step, value = text.split(": ")
    assert float(value) == pytest.approx(20 + float(step) / 10)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_sticks_out(page, report, width) -> None:
    page.open(report, width=width, phone=width < 500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.errors == []


def test_without_javascript_pictures_and_tables_are_there(browser, report, tmp_path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.errors.clear()
        browser.open(report)
        # The debugger may still ask: it is the page's own scripts that are off.
        assert browser.evaluate("document.documentElement.classList.contains('js')") is False
        assert (
            browser.evaluate("getComputedStyle(document.querySelector('.toolbar')).display")
            == "none"
        )
        views = "[...document.querySelector('.pair').querySelectorAll('.view')]"
        boxes = browser.evaluate(f"{views}.map(v => v.getBoundingClientRect().x)")
        assert len(boxes) == 3
        assert boxes == sorted(set(boxes))  # side by side, none over another
        assert browser.evaluate(f"{views}.every(v => v.offsetWidth > 40)")
        assert browser.evaluate("document.querySelectorAll('table').length") >= 4
        assert browser.errors == []
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_before_and_after_stand_side_by_side_least_gain_first(browser, tmp_path) -> None:
    images = EvaluationImages(open_source(str(pictures_in(tmp_path, 6))), 3)
    before, after = tiny_kl(), tiny_kl()
    with torch.no_grad():
        after.decoder.conv_out.bias.add_(0.1)
    evaluation = evaluate_change(("old", before), ("new", after), images, Options(pairs=6))
    save(evaluation, tmp_path / "out")
    browser.errors.clear()
    browser.open(write_report(tmp_path / "out"))
    shown = (
        "[...document.querySelectorAll('.pair')[0].querySelectorAll('.view')]"
        ".filter(v => v.offsetWidth > 0).map(v => v.querySelector('span').textContent)"
    )
    assert browser.evaluate(shown) == ["original", "old", "new"]
    names = "[...document.querySelectorAll('.pair figcaption b')].map(b => b.textContent)"
    rows = sorted(evaluation.change["per_image"], key=lambda row: row["psnr"])
    assert browser.evaluate(names) == [row["id"] for row in rows]
    click(browser, ".toolbar [data-mode=wipe]")
    assert browser.evaluate(shown) == ["original", "new"]
    click(browser, ".toolbar [data-stage='0']")
    assert browser.evaluate(shown) == ["original", "old"]
    assert browser.errors == []
