"""Whether the hub can be reached, found out briefly: its clients ask for half a minute."""

import contextlib
import threading
from collections.abc import Iterator

from first_stage.errors import first_line

_PATIENCE = 6.0
"""Seconds to wait for an answer of the hub before it counts as out of reach."""

_SWITCH = "HF_HUB_OFFLINE"


def why_out_of_reach() -> str | None:
    """Ask the hub once and briefly.

    Returns:
        Why it cannot be reached; `None` where it answers.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer = [f"{constants.ENDPOINT} gave no answer in {_PATIENCE:.0f} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            answer[0] = ""
        except Exception as error:
            answer[0] = f"{constants.ENDPOINT}: {first_line(error)}"

    thread = threading.Thread(target=ask, daemon=True)  # a name server may take longer
    thread.start()
    thread.join(_PATIENCE)
    return answer[0] or None


@contextlib.contextmanager
def datasets_asked_once() -> Iterator[str]:
    """Where the hub is out of reach, `datasets` looks into its cache here and nowhere else.

    Yields:
        Words for behind "the hub" in a message, where it is out of reach; empty where it answers.
    """
    import datasets
    from huggingface_hub import constants

    reason = why_out_of_reach()
    with contextlib.ExitStack() as restored:
        if reason is not None:
            for module in (constants, datasets.config):
                restored.callback(setattr, module, _SWITCH, getattr(module, _SWITCH))
                setattr(module, _SWITCH, True)
        yield "" if reason is None else f", which cannot be reached ({reason})"
