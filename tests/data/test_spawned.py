"""Workers that are spawned instead of forked, as on macOS and from Python 3.14 on."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from cache_helpers import make_vae
from conftest import ROOT, arguments
from data_folders import put
from shards import write_shards

SCRIPT = """
    import json, multiprocessing, sys
    multiprocessing.set_start_method("spawn")
    train_line, cache_line = (json.loads(text) for text in sys.argv[1:])
    from first_stage.config import parse_config
    from first_stage.training.loop import train
    assert train(parse_config(train_line)).finished
    from first_stage.commands.cache import main
    main(cache_line)
    """


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_training_and_cache_with_spawned_workers(tmp_path, kind):

    if kind == "folder":
        data = put(tmp_path / "data", *(f"{c}/{n}.png" for c in "ab" for n in range(6)))
        (data / "a" / "0.txt").write_text("caption")
    else:
        data = write_shards(tmp_path / "data", kind, (5, 7))
    make_vae().save_pretrained(tmp_path / "vae")
    fields = {"data.workers": 2, "data.streaming": kind != "folder", "train.max_steps": 2}
    line = arguments(tmp_path / "run", data, **fields)
    cache = ["--first_stage", str(tmp_path / "vae"), "--data.path", str(data)]
    cache += ["--output", str(tmp_path / "c"), "--data.workers", "1", "--data.resolution", "16"]
    cache += ["--data.streaming", "true" if kind != "folder" else "false"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(line), json.dumps(cache)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 samples" in done.stdout
