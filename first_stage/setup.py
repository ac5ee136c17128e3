"""What a run needs before it begins: the accelerator and the data."""

import warnings
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from first_stage.config import Config
from first_stage.data import Source, is_builtin, open_source, split_source
from first_stage.errors import ConfigError
from first_stage.logbook import tracker_of


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator, which joins the job's processes.

    Raises:
        ConfigError: When precision or tracker cannot be had here.
    """
    tracker, remark = tracker_of(config.train.tracker)
    # What torch offers instead would still copy buffers at the start, which is as good here, but
    # versions before 2.13 do not have it.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    try:
        accelerator = Accelerator(
            mixed_precision=config.train.precision,
            log_with=tracker,
            project_dir=config.output_dir,
            # Buffers never differ between processes, and copying them in the critic's second
            # forward pass would change what its first one saved for the backward pass.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
    except ValueError as error:
        raise ConfigError(
            f"train.precision {config.train.precision!r} cannot be used: {error}"
        ) from error
    if remark and accelerator.is_main_process:
        print(remark, flush=True)
    return accelerator


def open_data(config: Config) -> tuple[Source, Source | None]:
    """The samples to train on, and the held-out ones if there are any."""
    data = config.data

    def opened(path: str, split: Any) -> Source:
        return open_source(path, data.image_column, split, data.split)

    if data.validation_path is not None:
        return opened(data.path, "train"), opened(data.validation_path, "validation")
    if is_builtin(data.path):
        return opened(data.path, "train"), opened(data.path, "validation")
    source = opened(data.path, "all")
    if data.validation_share == 0:
        return source, None
    return split_source(source, data.validation_share, config.seed)
