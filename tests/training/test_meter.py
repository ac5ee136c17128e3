"""What the meter averages, and what of it a checkpoint keeps."""

import pytest
import torch

from first_stage.training.meter import Meter


@pytest.mark.parametrize(
    ("world", "expected"),
    [(1, (2 * 2.0 + 5.0) / 3), (2, (2 * 1.0 + 5.0) / 3), (3, (2 * 2.0 + 5.0) / 3)],
)
def test_steps_before_a_restart_count_as_often_as_they_were_done(world, expected):
    meter = Meter()
    # Two steps on two processes, whose means over them are 1 and 3: on two each keeps its own.
    meter.load_state_dict({"loss": torch.tensor([[2.0, 2.0], [6.0, 2.0]])}, 0, world)
    meter.add(2, {"loss": torch.tensor(5.0)})
    assert meter.averages(lambda tensor: tensor)["loss"] == pytest.approx(expected)
