"""Nothing is read or written outside the tensors that a launch is given: every address of every kernel, in Triton's
interpreter, each tensor in room of its own. A number that is read beyond the end and thrown away changes no result.
"""

from __future__ import annotations

import bisect
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import otfuse
from otfuse._backends.triton import attend as backend
from otfuse._backends.triton import paths, places
from otfuse._backends.triton import streaming as large
from otfuse._backends.triton import varlen_streaming as long_launches
from otfuse._backends.triton.backend import TritonBackend
from otfuse._backends.triton.launch import INTERPRETED
from otfuse._backends.triton.paths import Path

GAP = 1 << 16  # bytes of nobody's, before and after a tensor


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All numbers from its first to its last, whatever its strides."""
    extent = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    return tensor.detach().as_strided((extent,), (1,))


@pytest.fixture
def outside(monkeypatch, device) -> dict[str, set[str]]:
    """By kernel that was launched: what it did outside its tensors."""
    if not INTERPRETED or device.type != "cpu":
        pytest.skip("needs Triton's interpreter")
    from triton.runtime import interpreter

    seen: dict[str, set[str]] = {}
    places: list[tuple[int, int]] = []  # where the tensors of this launch begin and end
    current: list[str] = []

    def on_host(self: Any, arguments: Any, options: Any) -> Any:
        copies: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        places.clear()
        current[:] = [self.fn.__name__]
        seen.setdefault(self.fn.__name__, set())

        def copy(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            key = value.data_ptr(), value.shape, value.stride(), value.dtype
            if key not in copies:
                numbers = flat(value)
                room = torch.empty(2 * GAP + numbers.nbytes, dtype=torch.uint8)
                held = room[GAP : GAP + numbers.nbytes].view(value.dtype)
                held.copy_(numbers)
                places.append((held.data_ptr(), held.data_ptr() + numbers.nbytes))
                copies[key] = held.as_strided(value.shape, value.stride()), room
            return copies[key][0]

        found = [copy(value) for value in arguments], {name: copy(value) for name, value in options.items()}
        places.sort()
        return found

    def back(self: Any, arguments: Any, on_host: Any, options: Any, options_on_host: Any) -> None:
        for value, held in zip(arguments, on_host):
            if isinstance(value, torch.Tensor):
                flat(value).copy_(flat(held))

    def check(what: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for address in set(pointers.data[mask.data].tolist()):
            place = bisect.bisect_right(places, (address, 1 << 64)) - 1
            if place < 0 or address + size > places[place][1]:
                seen[current[0]].add(what)

    def load(
        self: Any, pointers: Any, mask: Any, *rest: Any, _load: Any = interpreter.InterpreterBuilder.create_masked_load
    ) -> Any:
        check("load", pointers, mask)
        return _load(self, pointers, mask, *rest)

    def store(
        self: Any,
        pointers: Any,
        value: Any,
        mask: Any,
        *rest: Any,
        _store: Any = interpreter.InterpreterBuilder.create_masked_store,
    ) -> Any:
        check("store", pointers, mask)
        return _store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", on_host)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", back)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", store)
    return seen


def odd(*shape: int) -> torch.Tensor:
    """Random numbers that begin at an odd place of their storage."""
    return torch.rand(torch.Size(shape).numel() + 1)[1:].view(shape).requires_grad_()


def backwards(out: Any) -> None:
    """From gradients of everything that has one."""
    found = [t for t in out if t is not None and t.requires_grad]
    if found:
        sum((torch.where(t.isfinite(), t, 0) * torch.rand(t.shape)).sum() for t in found).backward()


def dense(path: Path | None, monkeypatch: pytest.MonkeyPatch, grad: str, weighted: bool) -> None:
    if path is not None:
        monkeypatch.setattr(large, "BLOCKS", {key: dict.fromkeys((2, 4, 8), (16, 32, 4, 2)) for key in large.BLOCKS})
        monkeypatch.setattr(large, "LINES", 32)
        monkeypatch.setattr(large, "num_steps", lambda *_: 3)
        monkeypatch.setattr(paths, "CLUSTER_PART", 512)
        monkeypatch.setattr(backend, "path_of", lambda *_: path)
    N, M = (3, 5) if path is Path.SMALL else (17, 35)
    a, b = (odd(3, N), torch.arange(M).expand(3, M) < 4) if weighted else (None, None)
    options = {"a": a, "b": b, "num_iters": 3, "grad": grad, "backend": "triton"}
    if path is not Path.RECOMPUTED:  # a cost is not made of anything
        backwards(otfuse.sinkhorn(odd(3, N, M), 0.2, **options))
    if path is not Path.SMALL:
        kinds = {"weights": "barycentric" if weighted else "plan", "return_plan": True}
        backwards(otfuse.sinkhorn_attend(odd(3, N, 7), odd(3, M, 7), **kinds, **options))


@pytest.mark.parametrize("grad, weighted", [("unroll", False), ("implicit", True), ("detach", True)])
@pytest.mark.parametrize("path", Path, ids=str)
def test_dense(outside, monkeypatch, path, grad, weighted):
    """Of three items, so that the last program of many small costs is not full."""
    dense(path, monkeypatch, grad, weighted)
    assert outside and not {name: found for name, found in outside.items() if found}


@pytest.mark.parametrize("stored", [Path.STORED, Path.RECOMPUTED], ids=str)
@pytest.mark.parametrize("grad", ["unroll", "implicit"])
def test_packed(outside, monkeypatch, grad, stored):
    """Items on chip, beyond it, empty, and longer than announced."""
    monkeypatch.setattr(places, "_largest_tile", lambda *_: (16, 16))
    monkeypatch.setattr(large, "BLOCKS", {key: dict.fromkeys((2, 4, 8), (16, 16, 4, 2)) for key in large.BLOCKS})
    monkeypatch.setattr(large, "LINES", 16)
    monkeypatch.setattr(large, "num_steps", lambda *_: 3)
    monkeypatch.setattr(long_launches, "choose", lambda *_: stored)
    x, y, a, b = odd(50, 7), odd(66, 7), odd(50), odd(66)
    cu_x, cu_y = torch.tensor([0, 3, 3, 20, 50], dtype=torch.int32), torch.tensor([0, 5, 6, 39, 66], dtype=torch.int32)
    options = {"a": a, "b": b, "return_plan": True, "num_iters": 3, "grad": grad, "backend": "triton"}
    backwards(otfuse.sinkhorn_attend_varlen(x, y, cu_x, cu_y, 18, 34, 0.5, **options))
    assert outside and not {name: found for name, found in outside.items() if found}


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weights"])
def test_loss(outside, monkeypatch, weighted):
    monkeypatch.setattr(TritonBackend, "device", "cpu")
    a, b = (odd(3, 17).detach(), torch.arange(35).expand(3, 35) < 4) if weighted else (None, None)
    otfuse.ot_alignment_loss(odd(3, 17, 35), odd(3, 17, 35), a=a, b=b).backward()
    assert outside and not {name: found for name, found in outside.items() if found}


@triton.jit
def _beyond_kernel(from_ptr, to_ptr, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(from_ptr + at)
    tl.store(to_ptr + at, tl.where(at < count, values, 0.0), mask=at < count)


def test_that_a_read_beyond_the_end_is_seen(outside):
    """Whose value is thrown away."""
    values, copied = odd(5).detach(), torch.empty(5)
    _beyond_kernel[(1,)](values, copied, 5, SIZE=8)
    assert outside == {"_beyond_kernel": {"load"}} and torch.equal(values, copied)
