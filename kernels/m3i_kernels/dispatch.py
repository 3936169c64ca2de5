"""The one switch between implementations: `auto | triton | reference`, kept in the environment variable M3I_KERNELS.

The variable itself is the state, so that every thread (autograd runs backward passes in its own) and every child
process sees the same choice. An operator is a sub-package; its implementations are functions named like it in
`reference.py` and, where somebody wrote one, `fused.py`. Adding that file is all it takes to register it, and Triton is
imported only when a fused implementation is about to run.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

VARIABLE = "M3I_KERNELS"
BACKENDS = ("auto", "triton", "reference")
_MODULE = {"triton": "fused", "reference": "reference"}


class use_backend:
    """Selects the implementation of every operator, for the process or for a `with` block.

    `use_backend("reference")` stays in force; `with use_backend("reference"): ...` restores the previous choice.

    Args:
        name: `auto` (fused where it exists and the tensors are on a GPU), `triton` (fused or an error), `reference`.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str) -> None:
        self._previous = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = _checked(name, "backend")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = self._previous


def current_backend() -> str:
    """Returns the choice in force, `auto` where none was made.

    Raises:
        ValueError: the environment variable holds an unknown name.
    """
    return _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def resolve(op_name: str, device: torch.device | str) -> str:
    """Returns which implementation (`triton` or `reference`) runs `op_name` on tensors of `device`.

    Raises:
        ValueError: no such operator; the choice is `triton` and there is no fused implementation, no Triton, or no
            device it runs on (CUDA, or the CPU under TRITON_INTERPRET=1).
    """
    if not _exists(op_name, "reference"):
        raise ValueError(f"no operator named {op_name!r} in m3i_kernels")
    backend = current_backend()
    if backend == "reference":
        return backend
    kind = torch.device(device).type
    if backend == "auto":
        return "triton" if kind == "cuda" and _exists(op_name, "fused") and _has_triton() else "reference"
    if not _exists(op_name, "fused"):
        raise ValueError(f"{VARIABLE}=triton: {op_name} has no fused implementation, use auto or reference")
    if not _has_triton():
        raise ValueError(f"{VARIABLE}=triton: the package triton is not installed, use auto or reference")
    if kind != "cuda" and not (kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"{VARIABLE}=triton: {op_name} got tensors on {kind}, needs cuda (or cpu with TRITON_INTERPRET=1)"
        )
    return backend


def implementation(op_name: str, device: torch.device | str, function: str = "") -> Callable[..., Any]:
    """Returns the function (named as the operator by default) that `resolve` chooses; imports its module on first use.

    Raises:
        ValueError: as `resolve`.
    """
    module = importlib.import_module(f"m3i_kernels.{op_name}.{_MODULE[resolve(op_name, device)]}")
    return getattr(module, function or op_name)


def _checked(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@functools.cache
def _exists(op_name: str, module: str) -> bool:
    if not op_name.isidentifier() or importlib.util.find_spec(f"m3i_kernels.{op_name}") is None:
        return False
    try:
        return importlib.util.find_spec(f"m3i_kernels.{op_name}.{module}") is not None
    except ModuleNotFoundError:  # a plain module, not a sub-package
        return False


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
