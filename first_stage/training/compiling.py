"""Compiling the networks of a step block by block (`train.compile`).

Blocks of the same class and shape share what was compiled, so it takes minutes and not longer; the
step itself, with its losses and its several backward passes through one graph, stays as it is.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from diffusers.utils import is_torch_version
from torch import nn

from first_stage.errors import ConfigError, first_line

BACKEND = "inductor"


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks that a network is made of: entries of its module lists with layers of their own.

    The innermost such lists count: a residual block, not the level that holds three of them.
    """
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            for entry in module:
                if _has_layers(entry) and not any(map(_has_layers, _listed(entry))):
                    yield entry


def compile_blocks(network: nn.Module, device: torch.device) -> None:
    """Have the blocks of a network compiled when they first run; its weights keep their names.

    Raises:
        ConfigError: When nothing can be compiled here.
    """
    _require_compiler(device)
    # Several losses are differentiated through one graph, whose buffers must stay.
    torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
    # Blocks ask for torch's version, which torch 2.8 cannot trace and none has to.
    torch.compiler.assume_constant_result(inspect.unwrap(is_torch_version))
    blocks = list(blocks_of(network))
    # All blocks of a class count as one function, which would run as it is after eight shapes.
    # Each has its own, and another one with the larger crops of the last steps.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(blocks))
    for block in blocks:
        block.compile(backend=BACKEND, dynamic=False)


@contextlib.contextmanager
def uncompiled(compiled: bool) -> Iterator[None]:
    """Run what was compiled as it is: batches of other sizes would be compiled anew."""
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _has_layers(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.children())


def _listed(module: nn.Module) -> Iterator[nn.Module | None]:
    """Entries of the module lists within a module."""
    for inner in module.modules():
        if isinstance(inner, nn.ModuleList):
            yield from inner


def _require_compiler(device: torch.device) -> None:
    try:
        torch.compile(_tried, backend=BACKEND)(torch.zeros(8, device=device))
    except Exception as error:
        raise ConfigError(
            f"train.compile is true, but torch cannot compile here: {first_line(error)}. Install a "
            "C++ compiler, or set it to false"
        ) from error


def _tried(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1
