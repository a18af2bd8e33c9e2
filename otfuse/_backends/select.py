"""The backends, and the choice between them: by device, dtype and shape of the tensors, at every call."""

from __future__ import annotations

import logging

from torch.compiler import is_compiling

from otfuse._backends.base import Backend, BackendError
from otfuse._backends.cpu.backend import CpuBackend
from otfuse._backends.torch.backend import TorchBackend
from otfuse._backends.tpc.backend import TpcBackend
from otfuse._backends.triton.backend import TritonBackend
from otfuse._problem import LossProblem, Problem

# In the order in which "auto" asks them.
BACKENDS: tuple[Backend, ...] = (TpcBackend(), TritonBackend(), CpuBackend(), TorchBackend())

_logger = logging.getLogger("otfuse")
_logged: set[tuple[object, ...]] = set()


def backends() -> dict[str, list[str]]:
    """Every backend by name, with the reasons why it cannot run here; an empty list means that it can.

    Example:
        >>> import otfuse
        >>> otfuse.backends()["torch"]
        []
    """
    return {backend.name: backend.unavailable() for backend in BACKENDS}


def select(problem: Problem | LossProblem, name: str) -> Backend:
    """The named backend if it can run the problem, or for ``"auto"`` the first that can.

    Raises:
        BackendError: the named backend cannot run the problem; lists every reason.
        ValueError: there is no backend of that name.
    """
    if name == "auto":
        return _first(problem)
    for backend in BACKENDS:
        if backend.name == name:
            if reasons := backend.why_not(problem):
                raise BackendError(_refusal(backend, reasons, problem))
            return backend
    names = ", ".join(f'"{backend.name}"' for backend in BACKENDS)
    raise ValueError(f'backend must be "auto" or one of {names}; got {name!r}')


def _first(problem: Problem | LossProblem) -> Backend:
    device = problem.values.device.type
    for backend in BACKENDS:
        # The device alone rules most of them out, and faster than a list of reasons is made.
        if backend.device in (None, device) and not backend.why_not(problem):
            _log_once(backend, problem)
            return backend
    raise AssertionError("the torch backend runs everything")


def _log_once(backend: Backend, problem: Problem | LossProblem) -> None:
    if is_compiling():
        return
    key = (backend.name, problem.values.device.type, problem.values.dtype)
    if key not in _logged:
        _logged.add(key)
        earlier = BACKENDS[: BACKENDS.index(backend)]
        passed_over = [f"{b.name}: {'; '.join(_why_passed_over(b, problem))}" for b in earlier]
        _logger.info("using backend '%s' (passed over: %s)", backend.name, " | ".join(passed_over) or "none")


def _why_passed_over(backend: Backend, problem: Problem | LossProblem) -> list[str]:
    """Off its device a backend is not asked, though some run there, by name, in an emulation."""
    if backend.device in (None, problem.values.device.type):
        return backend.why_not(problem)
    if isinstance(problem, LossProblem):
        return backend.why_not(problem)
    return backend.unavailable() + Backend.unsupported(backend, problem)


def _refusal(backend: Backend, reasons: list[str], problem: Problem | LossProblem) -> str:
    device = problem.values.device.type  # a backend that only emulates another is no way out
    usable = [f'"{b.name}"' for b in BACKENDS if b.device in (None, device) and not b.why_not(problem)]
    return (
        f"backend '{backend.name}' cannot run this problem ({problem.describe()}): {'; '.join(reasons)}. "
        f'Pass backend="auto" or one that can: {", ".join(usable)}.'
    )
