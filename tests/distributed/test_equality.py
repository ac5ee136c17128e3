"""One process or many: the same samples, gradients, weights and log lines."""

import pytest
from equality import RECORDING, check_equal, line
from equality import reference as reference  # a fixture
from launching import run


@pytest.mark.parametrize(
    ("world", "micro"),
    [
        (2, 3),
        pytest.param(3, 2, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_what_one_does(reference, world, micro):
    name = f"on-{world}"
    text = run(
        *(world, RECORDING, reference / f"record-{name}", reference / "one"),
        *line(reference, name, micro),
        output=reference / f"{name}.txt",
    )
    assert f"{world} processes on cpu" in text
    check_equal(reference, name, world)
