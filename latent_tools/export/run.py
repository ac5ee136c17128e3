"""An export from its checks to its last file, resumable unit by unit."""

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from first_stage.files import TEMPORARY, write_json
from latent_tools.export.cache import Draw, ExportCache
from latent_tools.export.formats import FORMATS, Format, check
from latent_tools.format.files import CacheError, read_json

_SAVE_EVERY = 5.0  # seconds between two writes of the journal, which grows with the cache


def export_cache(
    cache: str | Path,
    form: str,
    output: str | Path,
    draw: Draw | None = None,
    seed: int = 0,
    any_pixel_range: bool = False,
) -> list[str]:
    """Write a cache in another project's layout; go on where an earlier launch was stopped.

    Args:
        cache: The cache; finished.
        form: A key of `FORMATS`.
        output: The folder; new, empty, or holding a part of the same export. For kohya the folder
            of the images.
        draw: `posterior` or `mean`: what formats without moments get; see `ExportCache`.
        seed: Seed of the draws.
        any_pixel_range: Export although the format's trainers decode to another pixel range.

    Returns:
        Lines for the user: what was made and how to point the reader at it.

    Raises:
        CacheError: When the cache does not have what the format needs, or the folder holds
            something else.
    """
    if form not in FORMATS:
        raise CacheError(f"format is {form!r}; it can be {', '.join(FORMATS)}")
    chosen, source, folder = FORMATS[form], ExportCache(Path(cache), draw, seed), Path(output)
    check(chosen, source, any_pixel_range)
    writer = chosen.writer(source, folder)
    journal = Journal(folder, chosen, source, getattr(writer, "order", None))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(source.ids), desc=f"exporting {form}", unit=" samples") as bar:
            for unit, places in source.units():
                if not journal.has(unit):
                    writer.write_unit(unit, places)
                    journal.add(unit, len(places))
                bar.update(len(places))
        writer.finish()
    except OSError as error:
        raise CacheError(f"{error.filename or folder}: {error.strerror or error}") from error
    finally:
        journal.save()
    return _report(chosen, source, folder)


class Journal:
    """Which units an export has: `<format>.export.json` in its folder.

    Args:
        folder: The export's folder.
        form: Its format.
        cache: What is exported.
        order: Of a format that numbers samples by their names, a hash of these.

    Raises:
        CacheError: When the folder holds something else, or units that were encoded anew since.
    """

    def __init__(self, folder: Path, form: Format, cache: ExportCache, order: str | None = None):
        self.path, self.cache = folder / f"{form.name}.export.json", cache
        stage = cache.manifest.first_stage
        self._about: dict[str, Any] = {
            "format": form.name,
            "cache": str(cache.path),
            "encoder_sha256": stage["encoder_sha256"],
            "preprocessing": cache.manifest.preprocessing,
            "store": cache.manifest.store,
            "values": "moments" if form.needs_posterior else cache.draw,
            "seed": cache.seed,
            "scaling_factor": cache.scaling_factor,
            "shift_factor": cache.shift_factor,
            "is_scaled": form.is_scaled,
            "order": order,
        }
        self._units: dict[str, dict[str, Any]] = {}
        self._saved = time.monotonic()
        if self.path.exists():
            self._load(folder)
        elif not form.name.startswith("kohya"):  # which writes beside images that are there
            _refuse_strangers(folder)

    def _load(self, folder: Path) -> None:
        there = read_json(self.path)
        for key, value in self._about.items():
            if key == "order" and there.get(key) != value:
                raise CacheError(
                    f"output {str(folder)!r} holds an export of other samples, and this format "
                    "numbers them in the order of their names: give another --output"
                )
            if key != "cache" and there.get(key) != value:
                raise CacheError(
                    f"output {str(folder)!r} holds an export with {key} {there.get(key)!r}, now it "
                    f"would be {value!r}: give another --output"
                )
        self._units = there.get("units", {})
        now = {str(unit) for unit, _ in self.cache.units()}
        for unit, entry in self._units.items():
            if unit not in now or entry["sha256"] != self.cache.digest(int(unit)):
                raise CacheError(
                    f"output {str(folder)!r} holds unit {unit} of the cache as it was before it "
                    "was encoded again: give another --output"
                )

    def has(self, unit: int) -> bool:
        """Whether a unit is written."""
        return str(unit) in self._units

    def add(self, unit: int, samples: int) -> None:
        """Note that a unit is written. A kill forgets the units of the last seconds at most."""
        self._units[str(unit)] = {"samples": samples, "sha256": self.cache.digest(unit)}
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the journal, if it says anything."""
        if self._units:
            write_json(self.path, {**self._about, "units": self._units}, indent=1)
        self._saved = time.monotonic()


def _refuse_strangers(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"output {str(folder)!r} is a file: give a folder")
    strangers = folder.iterdir() if folder.is_dir() else ()
    for entry in strangers:
        if not entry.name.startswith(TEMPORARY):
            raise CacheError(
                f"output {str(folder)!r} is not empty (it has {entry.name!r}) and holds no export "
                "in this format: give another folder"
            )


def _report(form: Format, cache: ExportCache, folder: Path) -> list[str]:
    lines = [f"{len(cache.ids)} samples as {form.name}: {folder}"]
    if cache.manifest.holds_tokens:
        stage = cache.manifest.first_stage
        lines.append(f"values    tokens of {stage['codes']:,} codes")
    elif not form.needs_posterior and form.name != "datasets":
        drawn = f"one draw from each posterior (seed {cache.seed})"
        what = {"posterior": drawn, "mean": "each posterior's mean", "sample": "the stored draws"}
        lines.append(f"values    {what[cache.draw]}")
    if form.is_scaled and not cache.manifest.holds_tokens:
        lines.append(f"scale     multiplied with scaling_factor {cache.scaling_factor:.6g}")
        if cache.shift_factor:
            lines.append(
                f"shift     {form.name}'s trainers know none, so shift_factor "
                f"{cache.shift_factor:.4g} is not subtracted; fold it into the first stage with "
                "first-stage export --fold_statistics to be rid of it"
            )
    lines.append(f"next      {form.hint.format(output=folder)}")
    return lines
