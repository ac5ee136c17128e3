"""An accelerator that computes what the recipe says, whatever somebody's accelerate config says."""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from first_stage.errors import ConfigError

_OTHER_TRAININGS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def make_plain_accelerator(precision: str, **options: Any) -> Accelerator:
    """The accelerator, which joins the job's processes.

    `accelerate launch` hands its config on in `ACCELERATE_*` variables, and the `Accelerator` takes
    from them what it is not told: how many backward passes share a gradient (each is then divided
    by their number), autocast, compilation. All of that is in the recipe, or not wanted.

    Args:
        precision: Of autocast: `no`, `bf16` or `fp16`.
        options: More arguments of `Accelerator`.

    Raises:
        ConfigError: When the launcher's config asks for another way of training.
        ValueError: When the precision cannot be had here.
    """
    for variable, name in _OTHER_TRAININGS.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"your accelerate config asks for {name} ({variable}={os.environ[variable]}), but "
                "training is data-parallel: launch with --multi_gpu, or with another --config_file"
            )
    accelerator = Accelerator(
        mixed_precision=precision,
        # As a plain number the variable would overrule it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        **options,
    )
    if precision != "no" and not accelerator.native_amp:
        raise ValueError(
            f"on this device ({accelerator.device.type}) accelerate would compute in float32 "
            "without a word: use bf16 or no"
        )
    return accelerator
