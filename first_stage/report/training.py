"""Sections of a training run: its course, its pictures, its recipe."""

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from first_stage.errors import UserError
from first_stage.evaluation.files import is_evaluation
from first_stage.files import read_log
from first_stage.metrics.training import Watch
from first_stage.report.charts import Series, colour_of, line_chart, share_chart
from first_stage.report.page import Section, details, file_uri, table

_FIRST = ("validation", "loss", "share")
"""Groups that are shown at once; the others are folded."""
_WANTED = (
    *("data.path", "data.resolution", "model.pretrained", "model.block_out_channels"),
    *("model.latent_channels", "loss.pixel", "loss.pixel_weight", "loss.pixel_cutoff"),
    *("loss.kl_weight", "loss.learned.weight", "loss.adversarial.kind", "loss.adversarial.weight"),
    *("critic.start_step", "train.max_steps", "train.encoder_steps", "train.batch_size"),
    *("train.learning_rate", "train.precision", "train.ema_decay", "seed"),
)
"""Fields of the recipe that are shown first."""
_TERMS = ("validation/psnr", "validation/ssim", "loss/pixel", "loss/kl", "loss/learned")
"""Curves that come first in their group."""
_CODES = {
    "tokens.png": "Held-out images over their tokens; each code has a color of its own",
    "codes.png": "Codes as the decoder draws them, by their use in training: the most used first",
}
_ABOUT = {
    "validation": "Held-out images, exported (averaged) weights",
    "loss": "Each term before its weight; mean over the steps since the last line",
    "share": "Share of the gradient that reaches the decoder",
    "critic": "The critic's verdicts",
    "norm": "Norm of each term's weighted gradient at the reconstruction",
    "latent_share": "Share of what acts on the latents directly, beside the decoder's gradient",
    "latent_norm": "Norm of that weighted gradient at the latents",
    "balance": "Factor on a term's weight that follows from the gradients' norms",
    "cosine": "Between each term's gradient and the pixel term's: near 0 it adds something of its "
    "own, below 0 the two pull in opposite directions",
    "kl": "Latent channels that carry more than 0.05 nats per value",
    "kl_channel": "KL of each latent channel in nats per latent value",
    "penalty": "What keeps the critic in bounds, before its weight",
    "noise": "Learned logarithm of the pixel term's noise level",
    "codes": "Codes of the last hundred steps; perplexity: how many equally frequent ones would be "
    "as hard to guess",
    "gradient_norm": "Before clipping",
    "learning_rate": "",
    "speed": "",
}


@dataclass(frozen=True)
class RunFiles:
    """What a training run left in its folder.

    Attributes:
        folder: The folder.
        recipe: Text of `config.yaml`; empty without one.
        config: The same, read.
        log: For each logged key, step and value in order of steps.
    """

    folder: Path
    recipe: str
    config: dict[str, Any]
    log: dict[str, list[tuple[float, float | None]]]


def read_run(folder: Path) -> RunFiles | None:
    """Read a run's files; `None` when the folder is not a run's.

    Raises:
        UserError: When the log or the recipe is damaged.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        return None
    log: dict[str, dict[float, float | None]] = {}
    for entry in read_log(path):
        step = float(entry["step"])
        for key, value in entry.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                finite = float(value) if math.isfinite(value) else None
                # A resumed run writes some steps again: the later line counts.
                log.setdefault(key, {})[step] = finite
    recipe_path = folder / "config.yaml"
    recipe = recipe_path.read_text(encoding="utf-8") if recipe_path.is_file() else ""
    try:
        config = yaml.safe_load(recipe) or {}
    except yaml.YAMLError as error:
        raise UserError(
            f"{str(recipe_path)!r} is damaged: {' '.join(str(error).split())}"
        ) from error
    series = {key: sorted(points.items()) for key, points in log.items()}
    return RunFiles(folder, recipe, config if isinstance(config, dict) else {}, series)


def training_section(run: RunFiles) -> Section:
    """The course of the run: charts by group, the pictures of the held-out images."""
    groups: dict[str, list[str]] = {}
    for key in run.log:
        groups.setdefault(key.split("/", 1)[0] if "/" in key else "other", []).append(key)
    shown = [g for g in _FIRST if g in groups]
    folded = [g for g in groups if g not in _FIRST]
    if not groups:
        parts = ["<p>The log has no values yet.</p>"]
    else:
        parts = [_warnings(run), _skipped(run.folder), _pictures(run.folder)]
        parts += [_group(g, groups[g], run) for g in shown]
    more = "".join(_group(g, groups[g], run) for g in folded)
    if more:
        parts.append(details("More curves: " + ", ".join(map(_words, folded)), more))
    return Section("training", "Training", "".join(parts))


def _warnings(run: RunFiles) -> str:
    """What the diagnostics said during the run, in words."""
    lines: dict[float, dict[str, float]] = {}
    for key, points in run.log.items():
        for step, value in points:
            if value is not None:
                lines.setdefault(step, {})[key] = value
    watch = Watch()
    said = [text for step in sorted(lines) for text in watch.read(int(step), lines[step])]
    return "".join(f'<p class="about">{escape(text)}</p>' for text in said)


def _skipped(folder: Path) -> str:
    """How many samples could not be decoded, with the first of them."""
    path = folder / "broken_files.jsonl"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        first = json.loads(lines[0])
    except (IndexError, ValueError):
        return ""
    words = (
        f"{len(lines):,} sample{'s' if len(lines) > 1 else ''} could not be decoded and "
        f"{'were' if len(lines) > 1 else 'was'} skipped, such as {first.get('id')}: "
        f"{first.get('reason')}. {path.name} lists them."
    )
    return f'<p class="about">{escape(words)}</p>'


def recipe_section(run: RunFiles) -> Section | None:
    """The run's configuration: the choices that matter most as a table, then all of it."""
    if not run.recipe:
        return None
    rows = []
    for section, fields in run.config.items():
        if isinstance(fields, dict):
            rows += [(f"{section}.{k}", v) for k, v in _flat(fields)]
        else:
            rows.append((section, fields))
    found = dict(rows)
    main = [
        [f"<code>{escape(k)}</code>", escape(str(found[k]))]
        for k in _WANTED
        if found.get(k) is not None
    ]
    body = table(["field", "value"], main, numeric_from=9) if main else ""
    body += details("config.yaml, complete", f"<pre>{escape(run.recipe)}</pre>")
    return Section("recipe", "Recipe", body)


def _flat(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    result: list[tuple[str, Any]] = []
    for key, value in fields.items():
        if isinstance(value, dict):
            result += [(f"{key}.{k}", v) for k, v in _flat(value)]
        else:
            result.append((key, value))
    return result


def _group(name: str, keys: list[str], run: RunFiles) -> str:
    head = f"<h3>{escape(_words(name).capitalize())}</h3>"
    if about := _ABOUT.get(name):
        head += f'<p class="about">{escape(about)}.</p>'
    if name == "share":
        lines = [
            Series(_words(key.split("/", 1)[-1]), run.log[key], colour_of(k))
            for k, key in enumerate(keys)
        ]
        return (
            head + '<div class="charts">' + share_chart("Gradient share", lines, "step") + "</div>"
        )
    keys = sorted(keys, key=lambda k: _TERMS.index(k) if k in _TERMS else len(_TERMS))
    log = False if name == "validation" else None
    charts = "".join(
        line_chart(_title(key), [Series(_title(key), run.log[key], colour_of(0))], "step", log=log)
        for key in keys
    )
    return f'{head}<div class="charts">{charts}</div>'


def _title(key: str) -> str:
    name = _words(key.split("/", 1)[-1])
    units = {"psnr": "PSNR (dB)", "ssim": "SSIM", "l1": "L1", "kl": "KL (nats per image)"}
    return units.get(name, name[:1].upper() + name[1:])


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", ", ")


def _pictures(folder: Path) -> str:
    frames = sorted((folder / "pictures").glob("step-*.png"))
    shown = []
    if frames:
        step = int(frames[-1].stem.removeprefix("step-"))
        shown.append((frames[-1], f"Originals over reconstructions at step {step:,}"))
    if (folder / "pictures/first-batch.png").is_file():
        text = "The first crops, as the network gets them"
        shown.append((folder / "pictures/first-batch.png", text))
    if not is_evaluation(folder / "evaluation"):  # whose own section shows them
        for name, text in _CODES.items():
            if (path := folder / "pictures" / name).is_file():
                shown.append((path, text))
    if (folder / "training.gif").is_file():
        shown.append((folder / "training.gif", "The same while training"))
    figures = "".join(
        f'<figure class="sheet"><img src="{file_uri(path)}" alt="{escape(text)}" loading="lazy">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for path, text in shown
    )
    return f'<div class="sheets">{figures}</div>' if figures else ""
