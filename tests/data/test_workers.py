"""Workers that die while a cache is made or a first stage measured: told as in training."""

import os
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from autoencoders import pictures_in, tiny_kl
from cache_helpers import cache, write_photos

import first_stage.evaluation.images as evaluation_images
import latent_tools.build.images as cache_images
from first_stage.data import open_source
from first_stage.errors import UserError
from first_stage.evaluation import EvaluationImages, Options, evaluate
from latent_tools import LatentDataset


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def no_shared_memory(*_):
    os.kill(os.getpid(), signal.SIGBUS)


def memory_short(*_):
    np.empty(2**50)


KILLED = (killed, "was killed, most often because memory ran out: fewer data.workers")
NO_ROOM = (no_shared_memory, "found no room in /dev/shm")
MEMORY = (memory_short, r"out of memory while images are .*: lower --data\.workers")


@pytest.mark.parametrize(("accident", "words"), [KILLED, MEMORY])
def test_an_evaluation(tmp_path, accident, words):
    source = open_source(str(pictures_in(tmp_path, 6)))
    images = EvaluationImages(source, 3, None)
    with (
        mock.patch.object(evaluation_images, "pixels_of", accident),
        pytest.raises(UserError, match=words) as error,
    ):
        evaluate([("tiny", tiny_kl())], images, Options(batch_size=2, workers=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("accident", "words"), [NO_ROOM, MEMORY])
def test_a_cache_keeps_its_complete_units(tmp_path, accident, words):
    write_photos(tmp_path / "data", 10)
    original, calls = cache_images.pixels_of, []

    def late(*given):
        calls.append(1)
        return original(*given) if len(calls) < 7 else accident()

    with (
        mock.patch.object(cache_images, "pixels_of", late),
        pytest.raises(UserError, match=words) as error,
    ):
        cache(tmp_path / "data", tmp_path / "c", batch_size=2, unit_size=2, workers=1)
    assert "\n" not in str(error.value)
    again = cache(tmp_path / "data", tmp_path / "c", batch_size=2, unit_size=2)
    assert again.is_complete
    assert len(LatentDataset(tmp_path / "c")) == 10


@pytest.mark.parametrize("how", ["torch", "python"])
def test_memory_that_runs_out_in_the_networks(tmp_path, how):
    """On the CPU torch has no error of its own for it."""

    def full(*_, **__):
        torch.empty(2**60, dtype=torch.uint8) if how == "torch" else bytearray(2**60)

    source = open_source(str(pictures_in(tmp_path, 3)))
    stage = tiny_kl()
    stage.encode = full
    with pytest.raises(UserError, match=r"out of memory with . images of .* lower --batch_size"):
        evaluate([("tiny", stage)], EvaluationImages(source, 3, None), Options(batch_size=2))
