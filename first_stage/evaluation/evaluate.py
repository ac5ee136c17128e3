"""Measure first stages: any diffusers autoencoder, on one process or several."""

from collections.abc import Callable, Iterable
from typing import Any

from first_stage.distributed.processes import Processes, shared
from first_stage.errors import UserError
from first_stage.evaluation.change import change_of, ranking
from first_stage.evaluation.code_pictures import draw_codes
from first_stage.evaluation.drift import check_alike
from first_stage.evaluation.files import Evaluation
from first_stage.evaluation.flat import flat_test
from first_stage.evaluation.images import ImageList
from first_stage.evaluation.measure import Measurement, Options
from first_stage.evaluation.pictures import (
    add_reconstructions,
    choose_by_gain,
    choose_pairs,
    start_pairs,
)
from first_stage.evaluation.seams import seam_test
from first_stage.models.first_stage import FirstStage, as_first_stage


def evaluate(
    first_stages: Iterable[tuple[str, Any]],
    images: ImageList | Callable[[int], ImageList],
    options: Options | None = None,
    processes: Processes | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure first stages on images.

    Args:
        first_stages: Names and loaded diffusers autoencoders, or `FirstStage`s, in eval mode on
            their device; may be a generator, so that only one is in memory at a time.
        images: The images, or a function that gives them for a number of channels.
        options: What to measure.
        processes: The processes that share the work; all of them must call this. `None`: those of
            the job that was launched, or this one.
        seed: Seed of the choice of images, for the protocol.
        progress: Show a progress bar on the main process.

    Returns:
        The results. Pictures are on the main process only.

    Raises:
        UserError: When something is not an autoencoder of images, when no image can be decoded, or
            when the first stages read different numbers of channels.
    """
    options = options or Options()
    processes = processes or Processes()
    found = Evaluation({}, [])
    chosen: ImageList | None = None
    for name, autoencoder in first_stages:
        stage = as_first_stage(autoencoder, name)
        if chosen is None:
            chosen = images(stage.in_channels) if callable(images) else images
        _check_channels(stage, chosen, found)
        _measure(stage, chosen, options, processes, found, progress)
        if processes.is_main:
            if not found.pairs:
                rows = found.first_stages[0]["per_image"]
                found.pairs = start_pairs(chosen, choose_pairs(rows, options.pairs))
            add_reconstructions(found.pairs, chosen, stage)
    if chosen is None:
        raise UserError("no first stage was given")
    found.protocol = _protocol(chosen, found.first_stages, options, seed)
    return found


def evaluate_change(
    before: tuple[str, Any],
    after: tuple[str, Any],
    images: ImageList | Callable[[int], ImageList],
    options: Options | None = None,
    processes: Processes | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure a first stage and the one it came from, and what changed: see `change.change_of`.

    Args:
        before: Name and diffusers autoencoder, or `FirstStage`, of the one it came from.
        after: The same of what it became. Both are in memory, on one device and in eval mode.
        images: As in `evaluate`.
        options: What to measure. The report's pairs are chosen by gain: the `WORST` first.
        processes: As in `evaluate`.
        seed: Seed of the choice of images, for the protocol.
        progress: Show a progress bar on the main process.

    Returns:
        The results, `before` first, with `change`.

    Raises:
        UserError: As `evaluate`, and when the two have unlike channels or sizes of latents.
    """
    options = options or Options()
    processes = processes or Processes()
    stages = [as_first_stage(autoencoder, name) for name, autoencoder in (before, after)]
    check_alike(*stages)
    chosen = images(stages[0].in_channels) if callable(images) else images
    found = Evaluation({}, [])
    for stage, earlier in zip(stages, (None, stages[0]), strict=True):
        _check_channels(stage, chosen, found)
        _measure(stage, chosen, options, processes, found, progress, earlier)
    found.change = change_of(*found.first_stages)
    if processes.is_main:
        places = choose_by_gain(ranking(found.change), options.pairs)
        found.pairs = start_pairs(chosen, places)
        for stage in stages:
            add_reconstructions(found.pairs, chosen, stage)
    found.protocol = _protocol(chosen, found.first_stages, options, seed)
    return found


def _check_channels(stage: FirstStage, images: ImageList, found: Evaluation) -> None:
    read = int(images.described["channels"])
    if stage.in_channels != read:
        first = found.first_stages[0]["name"] if found.first_stages else None
        raise UserError(
            f"{stage.name!r} takes images of {stage.in_channels} channels, but the images were "
            f"read into {read}" + (f" for {first!r}: evaluate them separately" if first else "")
        )


def _measure(
    stage: FirstStage,
    images: ImageList,
    options: Options,
    processes: Processes,
    found: Evaluation,
    progress: bool,
    before: FirstStage | None = None,
) -> None:
    """Add the figures and test pictures of one more first stage."""
    measurement = Measurement(stage, images, options, processes, before)
    result = measurement.run(progress)
    display = images.reading.display
    result["flat"], flat = shared(processes, lambda: flat_test(stage, display))
    result["seams"], seams = None, None
    if options.tiled:
        result["seams"], seams = shared(processes, lambda: seam_test(stage, images, options.tiled))
    found.first_stages.append(result)
    if processes.is_main:
        shares = measurement.code_shares
        found.codes.append(None if shares is None else draw_codes(stage, shares, display))
        found.flat.append(flat)
        found.seams.append(seams)


def _protocol(
    images: ImageList, results: list[dict[str, Any]], options: Options, seed: int
) -> dict[str, Any]:
    return {
        **images.described,
        "images": len(results[0]["per_image"]),
        "unreadable_images": len(results[0]["unreadable"]),
        "seed": seed,
        "latents": "mode of the posterior",
        "padding": "last row and column repeated to a multiple of the downsample factor; "
        "cropped back",
        "pixels": "clamped to [-1, 1] and "
        + ("kept at full precision" if images.reading.value_range else "rounded to 8 bits")
        + ", originals and reconstructions alike",
        "weights": "float32",
        "psnr": "dB, peak 1, from the mean squared error of each image over all channels",
        "ssim": "Gaussian window of 11 pixels, sigma 1.5, mirrored border, mean over channels",
        "ms_ssim": "five scales, images of at least 176 pixels a side",
        "l1": "mean absolute error on the [-1, 1] scale",
        "high_frequency": "at least 0.25 cycles per pixel",
        "feature_distance": "1 - cosine of the feature vectors of an image and its reconstruction",
        "means": "over images",
        "probed_images": min(options.probed, len(results[0]["per_image"])),
    }
