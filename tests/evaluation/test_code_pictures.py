"""Pictures of codes and tokens: the order, the middle of each, and one color for each code."""

import math

import numpy as np
import pytest
import torch
from autoencoders import tiny_vq
from torch.nn import functional as F

from first_stage.evaluation.code_pictures import (
    MOST_CODES,
    code_colors,
    draw_codes,
    draw_tokens,
    token_maps,
)
from first_stage.evaluation.codes import by_use
from first_stage.models.first_stage import FirstStage


@pytest.fixture
def stage(monkeypatch):
    """16 codes; code n is drawn in gray n / 15, and its surroundings as they are."""
    stage = FirstStage(tiny_vq())

    def decode(tokens):
        gray = (tokens[:, None].float() / 15 * 2 - 1).expand(-1, 3, -1, -1)
        return F.interpolate(gray, scale_factor=stage.downsample_factor, mode="nearest")

    monkeypatch.setattr(stage, "decode_tokens", decode)
    return stage


def cells(picture):
    """The gray in the middle of each cell, row by row; white where there is none."""
    pixels = np.asarray(picture.convert("L"))[4 + 8 :: 20, 4 + 8 :: 20]
    return (pixels.flatten() / 255 * 15).round().astype(int).tolist()


def test_codes_are_drawn_from_the_most_used_to_the_least(stage):
    shares = torch.zeros(16)
    shares[[7, 2, 11]] = torch.tensor([0.2, 0.5, 0.3])
    assert cells(draw_codes(stage, shares)) == [2, 11, 7]
    shares = torch.arange(1, 17) / 136
    assert cells(draw_codes(stage, shares)) == list(range(15, -1, -1))


def test_before_any_is_used_all_are_drawn(stage):
    assert sorted(cells(draw_codes(stage, torch.zeros(16)))) == list(range(16))


def test_at_most_so_many_codes_are_drawn():
    stage = FirstStage(tiny_vq(codes=MOST_CODES + 9))
    picture = draw_codes(stage, torch.ones(MOST_CODES + 9))
    columns = 2 * math.isqrt(MOST_CODES)
    assert picture.size == (columns * 20 + 4, MOST_CODES // columns * 20 + 4)


def test_a_token_map_has_a_color_for_each_code(stage):
    tokens = torch.arange(16).view(1, 4, 4)
    colors = code_colors(stage.bottleneck.table())
    assert len({tuple(color) for color in colors.tolist()}) == 16
    found = token_maps(stage, stage.bottleneck.from_tokens(tokens))
    assert np.array_equal(found[0].reshape(16, 3), colors)


def test_colors_follow_the_longest_axes_of_the_codebook():
    line = torch.linspace(-3, 3, 9)[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    table = torch.stack([0.01 * torch.randn(9), line], 1)
    red = code_colors(table)[:, 0].astype(int)
    assert np.array_equal(red.argsort(), line.argsort().numpy())
    assert (code_colors(line[:, None])[:, 1:] == 127).all()  # no second axis


def test_images_stand_over_their_tokens(stage):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    side = 16 // stage.downsample_factor
    pixels = np.asarray(draw_tokens(stage, images))
    assert pixels.shape == (2 * 20 + 4, 2 * 20 + 4, 3)
    maps = token_maps(stage, stage.encode(images).latents)
    step = stage.downsample_factor
    for number in range(2):
        shown = pixels[24 : 24 + 16 : step, 4 + 20 * number : 20 + 20 * number : step]
        assert shown.shape == (side, side, 3)
        assert np.abs(shown.astype(int) - maps[number]).max() <= 1


def test_use_by_rank_is_averaged_in_groups():
    assert by_use(torch.tensor([0.1, 0.0, 0.6, 0.3])) == [
        [1, pytest.approx(0.6)], [2, pytest.approx(0.3)], [3, pytest.approx(0.1)], [4, 0.0],
    ]  # fmt: skip
    many = by_use(torch.arange(1024) / 1024)
    assert len(many) == 256
    assert many[0] == [4, pytest.approx((1023 + 1022 + 1021 + 1020) / 4096)]
    assert many[-1][0] == 1024
