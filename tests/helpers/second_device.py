"""A second device on paper: tensors that say they are elsewhere, and computations that are seen.

No GPU is needed to know what a program asks of one. Under `SecondDevice` every tensor of the
device `meta` holds its real values in memory; each operation runs on them for real, is noted with
what it crossed (host to device and back, waits, float64), and gives the values it would have given.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")

WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "item"),
    *("bincount", "repeat_interleave", "is_nonzero", "unique_dim", "unique_consecutive"),
}
"""Operations after which the host waits for the device: their result's value or size is needed."""
_COUNTERS = ("_foreach_add_", "_fused_adamw_")


class _There(Tensor):
    """A tensor that says it is on the second device; `held` are its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"_There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of SecondDevice")


@dataclass
class Seen:
    """What crossed the border.

    Attributes:
        operations: How often each operation ran there, views aside.
        waits: Operations for which the host waited.
        copies: Tensors that were made on the host and sent, by shape; and whether it waited.
        wide: Operations with a float64 tensor there.
    """

    operations: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    copies: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)


class SecondDevice(TorchDispatchMode):
    """See the module's docstring. A context manager.

    Attributes:
        seen: What happened since `forget`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def forget(self) -> None:
        """Start anew."""
        self.seen = Seen()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        there = [x for x in given if isinstance(x, _There)]
        target = kwargs.get("device")
        goes_there = target is not None and torch.device(target) == DEVICE
        if goes_there:
            kwargs["device"] = torch.device("cpu")
        name = function.__name__.split(".")[0]
        result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        comes_back = name == "_to_copy" and target is not None and not goes_there
        stays = goes_there or (bool(there) and not comes_back)
        if name == "copy_":
            stays = isinstance(args[0], _There)
        made = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        self._note(name, function, args, kwargs, given, there, made, stays)
        if not stays or name == "_local_scalar_dense":
            return result
        wrapped = tree_map(lambda x: _There(x) if isinstance(x, Tensor) else x, result)
        if any(isinstance(x, Tensor) and not isinstance(x, _There) for x in made):
            kwargs.pop("device", None)
        return return_and_correct_aliasing(function, args, kwargs, wrapped)

    def _note(self, name, function, args, kwargs, given, there, made, stays) -> None:
        here = [x for x in given if not isinstance(x, _There)]
        if stays and not function.is_view and name not in ("detach", "alias"):
            self.seen.operations[name] += 1
        if there and name in WAITS:
            self.seen.waits.append(name)
        masks = [x for x in _indices(name, args) if x.dtype in (torch.bool, torch.uint8)]
        if there and masks:
            self.seen.waits.append(f"{name} with a mask")
        non_blocking = bool(kwargs.get("non_blocking"))
        if name == "copy_":
            non_blocking = non_blocking or args[2:] == (True,)
        # A scalar may be beside tensors of another device, and so may a fused update's counter.
        sent = [x for x in here if x.ndim or name == "_to_copy"] if stays else []
        if sent and name not in _COUNTERS:
            self.seen.copies.append((tuple(sent[0].shape), not non_blocking))
        if name in ("_to_copy", "copy_") and there and not stays and not non_blocking:
            self.seen.waits.append(f"{name} to the host")
        on_it = [*(x.held for x in there), *(made if stays else [])]
        if any(x.dtype == torch.float64 for x in on_it):
            self.seen.wide.append(name)


_real_autocast = torch.autocast


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    """There is no other precision there."""
    if device_type == DEVICE.type:
        return nullcontext()
    return _real_autocast(device_type, *args, **kwargs)


class _Literals(TorchFunctionMode):
    """Python's numbers as tensors on the second device: made on the host, and sent."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.new_tensor and isinstance(args[0], _There):
            like, *args = args
            kwargs = {"dtype": like.dtype, "device": DEVICE, **kwargs}
            function = torch.tensor
        if function is Tensor.tolist and isinstance(args[0], _There):
            return args[0].cpu().tolist()
        if function is Tensor.__getitem__ and isinstance(args[0], _There):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            sent = [torch.tensor(p).to(DEVICE) if isinstance(p, list) else p for p in places]
            return function(args[0], tuple(sent))
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None:
            kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, _There) else x


def _indices(name: str, args: Any) -> list[Tensor]:
    if name not in ("index", "index_put_", "index_put"):
        return []
    return [x for x in args[1] if isinstance(x, Tensor)]


def _forget_what_was_sent() -> None:
    """Empty the caches of tensors that were sent to a device once."""
    for name, module in list(sys.modules.items()):
        if name.startswith("first_stage."):
            for cached in vars(module).values():
                if (
                    hasattr(cached, "cache_clear")
                    and "device" in inspect.signature(cached).parameters
                ):
                    cached.cache_clear()


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """Everything that accelerate puts on a device goes to the second one."""
    mode = SecondDevice()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            mock.patch.object(Accelerator, "device", DEVICE),
            mock.patch.object(torch, "autocast", _autocast),
            mock.patch("torch.optim.adam._device_dtype_check_for_fused"),
            mode,
            _Literals(),
        ):
            yield mode
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        _forget_what_was_sent()
