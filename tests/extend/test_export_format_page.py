"""docs/extend/export-format.md, followed from outside the library."""

import os
import subprocess
import sys

import numpy as np
from cache_helpers import cache, make_vae, write_photos
from conftest import ROOT
from pages import files_of, write_files

PAGE = "docs/extend/export-format.md"


def run(folder, *line):
    return subprocess.run(
        [sys.executable, "export_flat.py", *map(str, line)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_format_of_ones_own_is_written_and_resumed(tmp_path):
    assert set(files_of(PAGE)) == {"flat_npy.py", "export_flat.py"}
    write_files(PAGE, tmp_path)
    write_photos(tmp_path / "data", 5)
    cache(tmp_path / "data", tmp_path / "cache", make_vae(), unit_size=2)
    line = ("export", tmp_path / "cache", "--output", tmp_path / "out", "--draw", "mean")
    missing = run(tmp_path, *line)
    assert missing.returncode == 2
    assert "flat-npy" in missing.stderr
    written = run(tmp_path, *line, "--format", "flat-npy")
    assert written.returncode == 0, written.stderr
    assert "numpy.load" in written.stdout

    from latent_tools import LatentDataset

    dataset = LatentDataset(tmp_path / "cache", sample="mean", normalize="none")
    for place in range(5):
        found = np.load(tmp_path / "out" / f"{place:08d}.npy")
        np.testing.assert_array_equal(found, dataset[place]["latents"].numpy())
    again = run(tmp_path, *line, "--format", "flat-npy")
    assert again.returncode == 0, again.stderr
    unknown = run(tmp_path, *line, "--format", "nothing")
    assert unknown.returncode == 2
    assert "format is 'nothing'; it can be lightningdit" in unknown.stderr
