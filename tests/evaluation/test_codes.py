"""The use of codes on images, by hand."""

import math

import pytest
import torch
from autoencoders import tiny_kl, tiny_vq

from first_stage.evaluation.codes import CodeCounts
from first_stage.evaluation.table import columns
from first_stage.models.first_stage import FirstStage


def test_counts_add_up_over_batches_and_processes():
    stage = FirstStage(tiny_vq())
    table = stage.bottleneck.table().detach()
    counts = CodeCounts(stage)
    for codes in ([0, 0, 0, 5], [0, 0, 0, 0]):
        counts.update(table[torch.tensor(codes)].T.reshape(1, 3, 2, 2))
    found = counts.summary(lambda tensor: tensor)
    assert found["used"] == 2 / 16
    assert found["most_frequent"] == 7 / 8
    entropy = -(7 / 8 * math.log(7 / 8) + 1 / 8 * math.log(1 / 8))
    assert found["perplexity"] == pytest.approx(math.exp(entropy))
    assert counts.summary(lambda tensor: 2 * tensor) == pytest.approx(found)
    shown = [c.text({"codes": found}) for c in columns([_stage(found)])[-3:]]
    assert shown == ["12.5%", "1", "87.5%"]


def _stage(codes):
    return {"metrics": {}, "features": {}, "sharpness": {"high_frequency_kept": None,
            "high_frequency_agreement": None}, "codes": codes,
            "latent_health": {"kl": None, "active_channels": None}}  # fmt: skip


def test_a_first_stage_without_codes_has_no_such_figures():
    counts = CodeCounts(FirstStage(tiny_kl()))
    counts.update(torch.zeros(1, 4, 2, 2))
    assert counts.summary(lambda tensor: tensor) == {}
    assert all(not c.title.startswith("code") for c in columns([_stage({})]))
