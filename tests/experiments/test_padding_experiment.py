"""What the experiment at the border measures."""

import pytest
import torch
from autoencoders import tiny_kl

from experiments.padding.__main__ import RINGS, psnr_by_ring, table
from first_stage.models.padding import set_padding


def test_paddings_differ_at_the_border_most(tmp_path):
    model = tiny_kl()
    set_padding(model, "reflect")
    model.save_pretrained(tmp_path)
    zeros, reflect = (psnr_by_ring(str(tmp_path), padding) for padding in ("zeros", "reflect"))
    gaps = {name: abs(zeros[name] - reflect[name]) for name in RINGS}
    assert gaps["outermost"] > gaps["inside 16"]
    assert all(torch.tensor(list(found.values())).isfinite().all() for found in (zeros, reflect))
    text = table({"zeros/zeros": [dict.fromkeys(RINGS, 20.0), dict.fromkeys(RINGS, 22.0)]})
    assert "| zeros/zeros | 21.00 (20.00 to 22.00) |" in text


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_what_a_folder_says_does_not_decide(padding, tmp_path):
    for name, mode in (("one", "zeros"), ("other", "reflect")):
        model = tiny_kl()
        set_padding(model, mode)
        model.save_pretrained(tmp_path / name)
    one, other = (psnr_by_ring(str(tmp_path / name), padding) for name in ("one", "other"))
    assert one == other
