"""Measure speed side by side, in one run, on the same work.

    python -m benchmarks train --config configs/demo.yaml
    python -m benchmarks train --config configs/demo.yaml --random_vgg
    python -m benchmarks cache --config configs/demo.yaml --images 2000
    python -m benchmarks read --latents 20000
    python -m benchmarks read --sizes 20000 1300000 10000000
    python -m benchmarks scale --config configs/demo.yaml --picture scaling.png
    python -m benchmarks quantize --config configs/demo_vq.yaml
    python -m benchmarks disturb --config configs/demo.yaml
    python -m benchmarks memory --config configs/finetune_decoder.yaml
    python -m benchmarks latents --config configs/demo.yaml
    python -m benchmarks gpu

Machines differ and are noisy: what is compared takes turns within one run, ratios are taken turn by
turn, and the median is printed with the smallest and largest value.
"""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from benchmarks import caching, training
from benchmarks.disturbing import benchmark_disturb
from benchmarks.gpu import benchmark_gpu
from benchmarks.latents import benchmark_latents
from benchmarks.memory import benchmark_memory
from benchmarks.quantizing import benchmark_quantize
from benchmarks.reading import benchmark_read
from benchmarks.reading_sizes import benchmark_sizes
from benchmarks.scaling import benchmark_scale
from benchmarks.timing import machine
from first_stage.errors import run_command
from first_stage.files import write_json

_LATENT_SHAPE = (4, 32, 32)
_SMALL = ("train", "cache", "read", "scale", "quantize", "disturb", "latents", "memory")


def main() -> None:
    """Run one of them, print its tables, and write them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Further arguments are those of training: --config FILE, --field.name value.",
    )
    parser.add_argument(
        "what",
        choices=[*_SMALL, "gpu"],
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a step form's turn, about")
    parser.add_argument("--random_vgg", action="store_true", help="train: add a VGG16 term")
    parser.add_argument("--images", type=int, default=2000, help="image files for cache")
    parser.add_argument("--side", type=int, default=32, help="their side in pixels (default: 32)")
    parser.add_argument("--latents", type=int, default=20000, help="latents for read")
    parser.add_argument("--sizes", type=int, nargs="+",
                        help="read: compare caches of so many samples instead")  # fmt: skip
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 2000, 4000, 8000],
                        help="scale: how many images are cached")  # fmt: skip
    parser.add_argument("--picture", type=Path, help="scale: draw the curves here")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rehearse", action="store_true", help="gpu: on tiny networks, anywhere")
    parser.add_argument("--again", help="gpu: measure parts anew whose names begin so")
    parser.add_argument("--page", type=Path, help="gpu: write the table between this page's marks")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options, recipe = parser.parse_known_args()
    recipe = recipe or ["--config", "configs/demo.yaml"]
    if options.only:
        found = _only(options, recipe)
        print(json.dumps(found))
        return
    if options.what == "gpu":
        json_file = options.json or Path("docs/benchmarks/gpu.json")
        if not benchmark_gpu(json_file, options.page, options.again, options.rehearse):
            raise SystemExit(1)
        return
    results = {"machine": machine(), options.what: _measure(options, recipe)}
    print(f"\n{json.dumps(results['machine'])}")
    if options.json:
        write_json(options.json, results)
        print(f"written to {options.json}")


def _only(options: argparse.Namespace, recipe: list[str]) -> dict[str, float]:
    """One variant, as `run_apart` asks for it."""
    if options.what == "cache":
        return caching.run_one(recipe, options.images, options.side)
    return training.run_one(recipe, options.only, options.seconds)


def _measure(options: argparse.Namespace, recipe: list[str]) -> dict[str, Any]:
    repeats, seconds = options.repeats, options.seconds
    if options.what == "train":
        vgg = training.random_vgg if options.random_vgg else contextlib.nullcontext
        with vgg(recipe) as whole:
            return training.benchmark_train(whole, repeats, seconds)
    if options.what == "cache":
        return caching.benchmark_cache(recipe, options.images, options.side, repeats)
    if options.what == "quantize":
        return benchmark_quantize(recipe, repeats)
    if options.what == "disturb":
        return benchmark_disturb(recipe, repeats)
    if options.what == "memory":
        return benchmark_memory(recipe)
    if options.what == "latents":
        return benchmark_latents(recipe, repeats)
    if options.what == "read" and options.sizes:
        return benchmark_sizes(options.sizes, _LATENT_SHAPE, repeats)
    if options.what == "read":
        return benchmark_read(options.latents, _LATENT_SHAPE, repeats)
    return benchmark_scale(recipe, seconds, options.counts, options.side, options.picture)


if __name__ == "__main__":
    run_command(main)
