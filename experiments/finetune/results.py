"""The table, in Markdown."""

import statistics
from collections.abc import Callable, Sequence

from experiments.diffusability.results import interval
from experiments.finetune.measure import Found, Samples


def table(found: Found) -> str:
    """What changed, a line each; means over seeds with half of their 95 % interval."""
    rows = [
        ("held-out PSNR (dB)", *(f"{value:.2f}" for value in found.psnr)),
        ("Fréchet distance of reconstructions, judge",
         *(f"{value:.2f}" for value in found.reconstructions)),
        ("**of samples**", *_both(found, lambda s: s.distance, ".2f")),
        ("samples read as asked (%)", *_both(found, lambda s: 100 * s.read_as_asked, ".1f")),
    ]  # fmt: skip
    if all(s.network is not None for s in found.before):
        rows.append(
            ("Fréchet distance of samples, network", *_both(found, lambda s: s.network or 0, ".1f"))
        )
    lines = ["| | old decoder | new decoder |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {old} | {new} |" for name, old, new in rows]
    half = found.gain["half_interval"]
    lines += [
        "",
        f"Encoder {'unchanged' if found.encoder_unchanged else 'CHANGED'}, drift of the latents "
        f"{found.drift['largest']:g}, old cache "
        f"{'accepted' if found.cache_accepted else 'REFUSED'}; gain in PSNR "
        f"{found.gain['mean']:+.2f} dB"
        + ("" if half is None else f" (± {half:.2f})")
        + f", {found.gain['improved']:.0%} of the images better. The judge reads "
        f"{found.judge_accuracy:.1%} of real held-out images right.",
    ]
    return "\n".join(lines) + "\n"


def _both(found: Found, value: Callable[[Samples], float], form: str) -> tuple[str, str]:
    return _text(found.before, value, form), _text(found.after, value, form)


def _text(samples: Sequence[Samples], value: Callable[[Samples], float], form: str) -> str:
    numbers = [value(s) for s in samples]
    half = interval(numbers)
    mean = f"{statistics.fmean(numbers):{form}}"
    return mean if half is None else f"{mean} ± {half:{form}}"
