"""A stream of shards, trained on by several real processes with workers."""

import collections
import json
from pathlib import Path

import pytest
from conftest import arguments
from launching import run
from shards import TOTAL, write_shards


@pytest.mark.slow
def test_a_streamed_training_is_the_same_on_one_two_and_three_processes(tmp_path):
    recording = Path(__file__).parents[1] / "helpers" / "recording.py"
    folder = write_shards(tmp_path / "shards", "tar", broken={4})
    fields = {
        **{"data.streaming": True, "data.shuffle_buffer": 12, "data.validation_share": 0},
        **{"train.max_steps": 2 * TOTAL // 6 + 1, "train.batch_size": 6, "data.workers": 1},
    }
    found = []
    for world in (1, 2, 3):
        record = tmp_path / f"record-{world}"
        line = arguments(tmp_path / f"run-{world}", folder, **fields)
        run(world, recording, record, "-", *line, output=tmp_path / "output.txt")
        parts = [
            json.loads((record / f"samples-{rank}-of-{world}.json").read_text())
            for rank in range(world)
        ]
        found.append({step: [s for part in parts for s in part[step]] for step in parts[0]})
    assert found[0] == found[1] == found[2]
    ids = [name for step in sorted(found[0], key=int) for name, _, _ in found[0][step]]
    for epoch in range(2):  # the broken one's place is taken by its neighbour
        counts = collections.Counter(ids[epoch * TOTAL : (epoch + 1) * TOTAL])
        assert len(counts) == TOTAL - 1
        assert sorted(counts.values())[-2:] == [1, 2]
