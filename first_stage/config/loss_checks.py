"""What the objective and the critic of a configuration must fulfil."""

from collections.abc import Iterator

from first_stage.config.losses import (
    CriticConfig,
    LossConfig,
    PretrainedConfig,
    term_names,
)


def loss_problems(
    loss: LossConfig, critic: CriticConfig, channels: int, resolution: int
) -> Iterator[str]:
    """What cannot work in these fields: field, value, consequence, remedy."""
    yield from _cutoff_problems(loss)
    yield from _critic_problems(loss, critic, resolution)
    yield from _balance_problems(loss)
    yield from _pretrained_problems(loss.pretrained, channels)


def _cutoff_problems(loss: LossConfig) -> Iterator[str]:
    cutoff = loss.pixel_cutoff
    if cutoff is not None and term_names(loss) == ["pixel"]:
        yield (
            f"loss.pixel_cutoff is {cutoff}, but the pixel term is the only one, so nothing would "
            "teach finer detail: set it to null, or give another term a weight"
        )


def _critic_problems(loss: LossConfig, critic: CriticConfig, resolution: int) -> Iterator[str]:
    if critic.rests_on(loss) and resolution < critic.smallest_image:
        yield (
            f"data.resolution ({resolution}) is too small for a critic of {critic.layers} strided "
            f"layers and {critic.scales} scales, which needs {critic.smallest_image} pixels: lower "
            "critic.layers or critic.scales"
        )
    learned = loss.learned
    available = (critic.layers + 1) * critic.scales
    chosen = tuple(range(available)) if learned.layers is None else learned.layers
    for layer in chosen:
        if layer >= available:
            yield (
                f"loss.learned.layers names layer {layer}, but a critic of {critic.layers} "
                f"strided layers has the feature maps 0 to {available - 1}"
            )
    if not chosen:
        yield "loss.learned.layers is empty: name a layer, or set loss.learned.weight to 0"
    weights = learned.layer_weights
    if weights is not None and len(weights) != len(chosen):
        yield (
            f"loss.learned.layer_weights has {len(weights)} weights for {len(chosen)} layers: give "
            "one for each"
        )
    if weights is not None and not sum(weights) > 0:
        yield f"loss.learned.layer_weights is {list(weights)}: weights are 0 or above, not all 0"
    adversarial = loss.adversarial
    if adversarial.kind == "wasserstein" and critic.rests_on(loss):
        bounds = (adversarial.gradient_penalty, adversarial.clip_weights, adversarial.r1)
        if not any(bounds) and critic.norm != "spectral":
            yield (
                "loss.adversarial.kind is wasserstein, but nothing bounds the critic, so its loss "
                "falls for ever: set loss.adversarial.gradient_penalty to 10, or "
                "loss.adversarial.clip_weights to 0.01"
            )
    if adversarial.clip_weights and critic.norm == "spectral":
        yield (
            f"loss.adversarial.clip_weights ({adversarial.clip_weights}) has no effect under "
            "critic.norm spectral, which divides the weights by their size: set one of them off"
        )


def _balance_problems(loss: LossConfig) -> Iterator[str]:
    balance = loss.balance
    if balance.kind != "shares":
        if balance.shares:
            yield (
                f"loss.balance.shares is given, but loss.balance.kind is {balance.kind}: set it to "
                "shares"
            )
        return
    used, given = term_names(loss), balance.shares
    if set(used) != set(given):
        yield (
            f"loss.balance.shares names {', '.join(given) or 'nothing'}, but the terms in use are "
            f"{', '.join(used) or 'none'}: give each of them a share"
        )
    elif "pixel" not in used:
        yield "loss.balance.kind shares needs the pixel term: raise loss.pixel_weight above 0"
    elif abs(sum(given.values()) - 1) > 1e-6:
        yield (
            f"loss.balance.shares adds up to {sum(given.values()):g}: shares are above 0 "
            "and add up to 1"
        )


def _pretrained_problems(pretrained: PretrainedConfig, channels: int) -> Iterator[str]:
    if not pretrained.in_use:
        return
    if pretrained.weights is None:
        yield (
            "loss.pretrained has a weight, but loss.pretrained.weights names no file: give VGG16's "
            "weights (.safetensors or .pth, torchvision's names) or a hub id"
        )
    if pretrained.lpips_weight and pretrained.heads is None:
        yield (
            f"loss.pretrained.lpips_weight is {pretrained.lpips_weight}, but "
            "loss.pretrained.heads names no file with the linear heads of LPIPS: give it, or use "
            "vgg_weight"
        )
    if not pretrained.layers or not all(layer <= 4 for layer in pretrained.layers):
        yield f"loss.pretrained.layers is {list(pretrained.layers)}; choose from 0 to 4"
    chosen = pretrained.channels
    if chosen is None and channels not in (1, 3):
        yield (
            f"loss.pretrained.channels is not given, but VGG16 sees three channels and the images "
            f"have {channels} (model.in_channels): say which three, such as [0, 1, 2]"
        )
    if chosen is not None and (
        len(chosen) != 3 or not all(channel < channels for channel in chosen)
    ):
        yield (
            f"loss.pretrained.channels is {list(chosen)}; name three of the {channels} channels, "
            f"from 0 to {channels - 1}"
        )
