"""The whole programme for a machine with a GPU: one command, resumable part by part.

    python -m benchmarks gpu                       # what is left of it, within nine minutes
    python -m benchmarks gpu --again steps         # measure parts anew whose names begin so
    python -m benchmarks gpu --rehearse            # the same on tiny networks, on any machine

Each part's result is written as soon as it is there; what the time does not allow is named, and the
next run goes on with it. A part that fails is told in the results and tried again by the next run.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from benchmarks.gpu_checks import eight_bit, equality, gpu_tests, out_of_memory, two_devices
from benchmarks.gpu_speed import caching, forms, layouts, quantizer, reading, steps
from benchmarks.gpu_table import write_table
from benchmarks.timing import machine
from first_stage.errors import UserError, first_line
from first_stage.files import write_json

BUDGET = 9 * 60
RECIPES = ("kl_f8", "vq_f8", "dc_f32")
_TINY = (
    "--model.block_out_channels", "[8,8]", "--model.layers_per_block", "1",
    "--model.norm_num_groups", "4", "--data.resolution", "16", "--critic.width", "4",
    "--critic.layers", "1", "--train.batch_size", "4",
)  # fmt: skip
_TINY_FAMILY = {
    "kl_f8": ("--model.mid_block_attention", "false"),
    "vq_f8": ("--model.mid_block_attention", "false", "--model.vq.codes", "64"),
    "dc_f32": ("--model.latent_channels", "4", "--model.dc.attention_levels", "1",
               "--model.dc.head_dim", "4"),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What the parts measure.

    Attributes:
        rehearsal: Tiny networks and a second or two for everything.
        seconds: About how long a step form is timed.
        images: How many files are cached.
        latents: How many latents are read.
    """

    rehearsal: bool
    seconds: float
    images: int
    latents: int

    def recipe(self, name: str, *more: str) -> list[str]:
        """Arguments of a training, as on a command line."""
        tiny = [*_TINY, *_TINY_FAMILY[name]] if self.rehearsal else []
        return ["--config", name, "--data.path", "photos", *tiny, *more]

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of autocast; processors have no float16."""
        return ("bf16",) if self.rehearsal else ("bf16", "fp16")


Part = Callable[[Setting], dict[str, Any]]


def programme(setting: Setting) -> dict[str, tuple[Part, float]]:
    """The parts by name, in their order, each with the seconds that it takes at most, about."""
    parts: dict[str, tuple[Part, float]] = {
        "equality": (equality, 30),
        "tests": (gpu_tests, 60),
        "steps against the usual forms": (forms, 75),
        "memory layouts": (layouts, 45),
    }
    for recipe in RECIPES:
        for precision in setting.precisions:
            parts[f"steps of {recipe} {precision}"] = (_steps(recipe, precision, False), 25)
    parts |= {
        "quantizer": (quantizer, 20),
        "caching": (caching, 90),
        "reading": (reading, 20),
        "out of memory": (out_of_memory, 20),
        "8-bit AdamW": (eight_bit, 25),
        "two devices": (two_devices, 60),
    }
    for recipe in RECIPES[:1] if setting.rehearsal else RECIPES:
        parts[f"steps of {recipe} bf16 compiled"] = (_steps(recipe, "bf16", True), 180)
    return parts


def _steps(recipe: str, precision: str, compiled: bool) -> Part:
    return lambda setting: steps(setting, recipe, precision, compiled)


def benchmark_gpu(json: Path, page: Path | None, again: str | None, rehearsal: bool) -> bool:
    """Run what is left of the programme.

    Args:
        json: Results of all parts; those of an earlier run on the same machine and versions stay.
        page: Whose table is written anew; `None`: none.
        again: Parts whose names begin so are measured anew; an empty string: all.
        rehearsal: On tiny networks, on whatever machine this is.

    Returns:
        Whether every part is there and holds.

    Raises:
        UserError: Without a GPU, unless it is a rehearsal.
    """
    if not rehearsal and not torch.cuda.is_available():
        raise UserError("no CUDA GPU is here; --rehearse runs the same programme on tiny networks")
    setting = Setting(True, 0.05, 6, 100) if rehearsal else Setting(False, 4.0, 4096, 20000)
    found, parts = _earlier(json), programme(setting)
    results: dict[str, Any] = found["parts"]
    for name in [n for n in results if again is not None and n.startswith(again)]:
        del results[name]
    began, left = time.monotonic(), []
    for name, (part, seconds) in parts.items():
        if name in results and "error" not in results[name]:
            continue
        if time.monotonic() - began + seconds > BUDGET:
            left.append(name)
            continue
        results[name] = _run(part, setting)
        print(
            f"{name}: {results[name]['seconds']:.0f} s {results[name].get('error', '')}", flush=True
        )
        write_json(json, found)
    if page is not None:
        write_table(page, found)
    failed = [name for name, result in results.items() if "error" in result]
    print(f"results {json}")
    if left:
        print(f"left    {', '.join(left)}: the same command goes on with these")
    if failed:
        print(f"failed  {', '.join(failed)}: the same command tries them again")
    return not left and not failed


def _earlier(json: Path) -> dict[str, Any]:
    """Results of an earlier run, where machine and versions are the same."""
    here = {"machine": machine(), "parts": {}}
    if not json.exists():
        return here
    found: dict[str, Any] = loads(json.read_text())
    same = ("device", "python", "torch", "first_stage")
    return found if all(found["machine"][k] == here["machine"][k] for k in same) else here


def _run(part: Part, setting: Setting) -> dict[str, Any]:
    _begin_anew()
    began = time.monotonic()
    try:
        result = part(setting)
    except Exception as error:  # the parts after it are measured all the same
        result = {"error": f"{type(error).__name__}: {first_line(error)}"}
    _begin_anew()
    return {**result, "seconds": time.monotonic() - began}


def _begin_anew() -> None:
    """Every part finds an empty device, and chooses a precision of its own."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
