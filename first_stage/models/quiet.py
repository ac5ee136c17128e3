"""diffusers without its own words, where ours say what is wrong."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without warnings and progress bars: what is wrong with weights is told in one line.

    diffusers still gives the hub's client an argument that newer ones warn about.
    """
    from diffusers.utils import logging as diffusers_logging

    before, bars = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        diffusers_logging.set_verbosity(before)
        if bars:
            diffusers_logging.enable_progress_bar()
