"""What the objective's fields refuse: in one line, with the field, its value and the remedy."""

import pytest

from first_stage.config.schema import Config
from first_stage.errors import ConfigError

REFUSED = {
    "critic.layers is 6": {"critic__layers": 6},
    "critic.scales is 0": {"critic__scales": 0},
    "data.resolution (16) is too small for a critic of 3": {"critic__layers": 3},
    "names layer 4, but": {"loss__learned__layers": "[4]"},
    "layer_weights has 1 weights for 2 layers": {"loss__learned__layer_weights": "[1]"},
    "layer_weights is [0.0, 0.0]": {"loss__learned__layer_weights": "[0, 0]"},
    "nothing bounds the critic": {"loss__adversarial__kind": "wasserstein"},
    "has no effect under critic.norm spectral": {
        "critic__norm": "spectral",
        "loss__adversarial__clip_weights": 0.01,
    },
    "loss.learned.ema_decay is 1.0": {"loss__learned__ema_decay": 1},
    "loss.adversarial.r1 is -1.0": {"loss__adversarial__r1": -1},
    "loss.pixel_cutoff is 0.0": {"loss__pixel_cutoff": 0},
    "loss.pixel_cutoff is 0.8": {"loss__pixel_cutoff": 0.8},
    "nothing would teach finer detail": {
        "loss__pixel_cutoff": 0.2,
        "loss__learned__weight": 0,
        "loss__adversarial__weight": 0,
    },
    "loss.huber_delta is 0.0": {"loss__huber_delta": 0},
    "set it to shares": {"loss__balance__shares": "{pixel: 1}"},
    "names pixel, but the terms in use are pixel, learned, adversarial": {
        "loss__balance__kind": "shares",
        "loss__balance__shares": "{pixel: 1}",
    },
    "adds up to 1.5": {
        "loss__balance__kind": "shares",
        "loss__balance__shares": "{pixel: 0.5, learned: 0.5, adversarial: 0.5}",
    },
    "loss.pretrained.weights names no file": {"loss__pretrained__vgg_weight": 1},
    "loss.pretrained.heads names no file": {
        "loss__pretrained__weights": "vgg.pth",
        "loss__pretrained__lpips_weight": 1,
    },
    "loss.pretrained.layers is [5]": {
        "loss__pretrained__weights": "vgg.pth",
        "loss__pretrained__vgg_weight": 1,
        "loss__pretrained__layers": "[5]",
    },
    "say which three": {
        "model__in_channels": 4,
        "loss__pretrained__weights": "vgg.pth",
        "loss__pretrained__vgg_weight": 1,
    },
    "loss.pretrained.channels is [0, 1]": {
        "loss__pretrained__weights": "vgg.pth",
        "loss__pretrained__vgg_weight": 1,
        "loss__pretrained__channels": "[0, 1]",
    },
    "the term would never enter": {"loss__learned__start_step": 99},
    "hinge2": {"loss__adversarial__kind": "hinge2"},
}


@pytest.mark.parametrize(("words", "fields"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_work_is_refused(tiny, words, fields):
    with pytest.raises(ConfigError) as caught:
        tiny(**fields)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "fields",
    [
        {"loss__adversarial__kind": "wasserstein", "loss__adversarial__gradient_penalty": 10},
        {"loss__adversarial__kind": "wasserstein", "critic__norm": "spectral"},
        {"critic__layers": 3, "loss__learned__weight": 0, "loss__adversarial__weight": 0},
        {"critic__scales": 2, "loss__learned__layers": "[3]"},
        {
            "model__in_channels": 4,
            "loss__pretrained__weights": "vgg.pth",
            "loss__pretrained__vgg_weight": 1,
            "loss__pretrained__channels": "[0, 1, 2]",
        },
    ],
)
def test_what_works_is_taken(tiny, fields):
    assert isinstance(tiny(**fields), Config)
