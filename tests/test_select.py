"""The choice of a backend: every reason, every error text, never a silent fallback."""

import importlib
import logging
import types
from dataclasses import asdict, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import otfuse
from otfuse._backends import base
from otfuse._backends.cpu import numba_import as _numba
from otfuse._backends.select import BACKENDS, _logged, select
from otfuse._backends.tpc import emulator as _tpc_emulator
from otfuse._backends.tpc import library as _tpc_library
from otfuse._backends.triton import backend as triton_backend
from otfuse._backends.triton import triton_import as _triton_import
from otfuse._backends.triton import version as _triton_version
from otfuse._problem import LossProblem, SolveOptions, cost_problem, token_problem

NAMES = ("tpc", "triton", "cpu", "torch")
NO_NUMBA = "numba is not installed (pip install 'otfuse[cpu]')"
NO_TRITON = "triton is not installed (pip install 'otfuse[cuda]')"
NO_HABANA = "habana_frameworks is not installed (it comes with Intel's Gaudi containers)"


def problem(device="cpu", dtype=torch.float32, shape=(2, 3, 4)):
    return cost_problem(torch.zeros(shape, device=device, dtype=dtype), None, None, SolveOptions(0.1, 5))


def tokens(device="cpu"):
    x, y = torch.zeros(2, 3, 8, device=device), torch.zeros(2, 4, 8, device=device)
    return token_problem(x, y, None, None, SolveOptions(0.1, 5), "cosine", "plan", False)


@pytest.fixture
def installed(monkeypatch):
    """Say which optional packages are there, whatever is installed where the tests run."""

    def declare(*packages):
        monkeypatch.setattr(_numba, "UNAVAILABLE", [] if "numba" in packages else [NO_NUMBA])
        for module in (triton_backend, _tpc_library):
            monkeypatch.setattr(module, "is_installed", lambda package: package in packages)
        monkeypatch.setattr(_tpc_emulator, "COMPILER", "g++" if "g++" in packages else None)

    return declare


@pytest.fixture
def log(caplog):
    """What is logged from here on, as if nothing had been yet."""
    remembered = set(_logged)
    _logged.clear()
    with caplog.at_level(logging.INFO, logger="otfuse"):
        yield caplog
    _logged.clear()
    _logged.update(remembered)


def backend_named(name):
    return next(backend for backend in BACKENDS if backend.name == name)


def test_order():
    assert tuple(backend.name for backend in BACKENDS) == NAMES
    assert tuple(otfuse.backends()) == NAMES


def test_backends_lists_reasons_and_nothing_else(installed):
    installed()
    found = otfuse.backends()
    assert found["torch"] == []
    assert found["cpu"] == [NO_NUMBA]
    assert NO_TRITON in found["triton"]
    assert NO_HABANA in found["tpc"]
    assert otfuse.backends() == found


def test_an_installed_package_is_no_reason(installed):
    installed("numba", "triton", "habana_frameworks")
    found = otfuse.backends()
    assert found["cpu"] == []
    assert NO_TRITON not in found["triton"]
    assert NO_HABANA not in found["tpc"]


def test_triton_names_the_missing_device(monkeypatch, installed):
    installed("triton")
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no CUDA device" in backend_named("triton").unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "torch finds no CUDA device" not in backend_named("triton").unavailable()


@pytest.mark.parametrize(("version", "usable"), [((3, 2), False), ((3, 5), False), ((3, 6), True), ((4, 0), True)])
def test_a_triton_that_does_not_compile_the_kernels_is_not_taken(monkeypatch, installed, version, usable):
    """With the way out; nor by the loss."""
    installed("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton_version, "VERSION", version)
    reasons = backend_named("triton").unavailable()
    assert (reasons == []) == usable
    if not usable:
        assert f"Triton {version[0]}.{version[1]}" in reasons[0] and "torch to 2.10" in reasons[0]
    with FakeTensorMode():  # on a device that need not be there
        plan = torch.empty(1, 2, 2, device="cuda")
        chosen = select(LossProblem(plan, plan, None, None, 1.0, "plan", "similarity", True), "auto")
    assert chosen.name == ("triton" if usable else "torch")


def test_a_triton_that_does_not_import_is_not_taken(monkeypatch, installed):
    """And is asked once."""
    tried = []

    def broken(name):
        tried.append(name)
        raise OSError("libtriton.so: cannot open shared object file")

    installed("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton_version, "VERSION", (3, 9))
    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", broken)
        importlib.reload(_triton_import)
    for _ in range(2):
        (reason,) = backend_named("triton").unavailable()
        assert "OSError: libtriton.so" in reason and "reinstall" in reason
    assert tried == ["triton"]
    importlib.reload(_triton_import)
    assert not backend_named("triton").unavailable()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tpc", "the tensors are on 'meta' (needs HPU)"),
        ("triton", "the tensors are on 'meta' (needs CUDA)"),
        ("cpu", "the tensors are on 'meta' (needs CPU)"),
    ],
)
@pytest.mark.parametrize("make", [problem, tokens])
def test_device_is_a_reason(name, reason, make):
    assert backend_named(name).unsupported(make("meta")) == [reason]
    assert reason in backend_named(name).why_not(make("meta"))


def test_triton_takes_every_dtype_and_every_size(monkeypatch):
    """On CUDA; in the interpreter CPU tensors, and never by itself."""
    triton = backend_named("triton")
    monkeypatch.setattr(triton_backend, "INTERPRETED", True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, 1, 1), (1, 128, 129), (1, 2048, 2), (3, 16384, 1), (1, 16384, 16384)):
            cost = torch.empty(1, dtype=dtype).expand(shape)
            assert triton.unsupported(cost_problem(cost, None, None, SolveOptions(0.1, 1))) == []
    assert select(problem(), "auto").name != "triton"
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    assert triton.unsupported(problem()) == ["the tensors are on 'cpu' (needs CUDA)"]


def test_cpu_takes_every_dtype_on_the_cpu_and_torch_everything():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert backend_named("cpu").unsupported(problem(dtype=dtype)) == []
        assert backend_named("torch").why_not(problem(dtype=dtype, device="meta")) == []


@pytest.mark.parametrize("name", ["tpc", "triton", "cpu"])
def test_refusal_lists_every_reason_the_problem_and_the_way_out(name, installed):
    installed()
    refused = tokens("meta")
    reasons = backend_named(name).why_not(refused)
    assert len(reasons) >= 2  # one of the machine's, one of the problem's
    with pytest.raises(otfuse.BackendError) as caught:
        select(refused, name)
    text = str(caught.value)
    assert text.startswith(f"backend '{name}' cannot run this problem (B=2 N=3 M=4 D=8, torch.float32 on 'meta'")
    assert "epsilon=0.1" in text
    assert "; ".join(reasons) in text
    assert text.endswith('Pass backend="auto" or one that can: "torch".')


def test_refusal_names_every_backend_that_can(installed):
    installed("numba")
    with pytest.raises(otfuse.BackendError, match='one that can: "cpu", "torch"'):
        select(problem(), "triton")


@pytest.mark.parametrize("name", ["tpc", "triton"])
def test_a_named_backend_refuses_in_every_public_function(name, installed):
    installed("numba")
    x, y, ends = torch.zeros(1, 3, 8), torch.zeros(1, 4, 8), (torch.tensor([0, 3]).int(), torch.tensor([0, 4]).int())
    calls = (
        lambda: otfuse.sinkhorn_attend(x, y, backend=name),
        lambda: otfuse.sinkhorn(x, 0.1, backend=name),
        lambda: otfuse.sinkhorn_attend_varlen(x[0], y[0], *ends, 3, 4, backend=name),
        lambda: otfuse.nn.OTAttention(backend=name)(x, y),
        lambda: otfuse.nn.OTFusion(backend=name)(x, y),
    )
    for call in calls:
        with pytest.raises(otfuse.BackendError, match=f"^backend '{name}' cannot run this problem"):
            call()


def test_a_backend_error_is_a_runtime_error():
    assert issubclass(otfuse.BackendError, RuntimeError)


@pytest.mark.parametrize("name", ["Triton", "", "numba", None, 3])
def test_unknown_backend(name):
    with pytest.raises(ValueError) as caught:
        otfuse.sinkhorn(torch.zeros(1, 2, 2), 0.1, backend=name)
    assert str(caught.value) == f'backend must be "auto" or one of "tpc", "triton", "cpu", "torch"; got {name!r}'


def test_tpc_on_the_cpu_takes_a_compiler_and_its_name(installed):
    """It is an emulation, for tests: neither chosen by itself nor offered as a way out."""
    installed("numba", "g++")
    assert select(problem(), "tpc").name == "tpc" and select(tokens(), "tpc").name == "tpc"
    assert select(problem(), "auto").name == "cpu"
    assert NO_HABANA in otfuse.backends()["tpc"]
    with pytest.raises(otfuse.BackendError, match='one that can: "cpu", "torch"'):
        select(problem(shape=(1, 2000, 2000)), "tpc")
    installed("numba")
    assert backend_named("tpc").why_not(problem()) == ["no C++ compiler for the emulator (install g++)"]
    assert select(problem(), "auto").name == "cpu"


def test_tpc_takes_what_fits_in_local_memory(installed):
    installed("g++")
    tpc = backend_named("tpc")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert tpc.why_not(problem(dtype=dtype)) == []
    for shape in ((1, 64, 256), (1, 128, 128), (1, 20, 20), (1, 17, 400), (1, 1, 1)):
        assert tpc.why_not(problem(shape=shape)) == []
    reasons = tpc.why_not(problem(shape=(1, 129, 129), dtype=torch.float64))
    assert len(reasons) == 2
    assert reasons[0] == "dtype float64 (has float32, bfloat16, float16)"
    assert reasons[1].startswith('a kernel matrix of 129 x 129 does not fit in local memory with grad="unroll"')


def test_auto_takes_the_first_that_can_and_logs_once(installed, log):
    installed("numba")
    assert select(problem(), "auto").name == "cpu"
    assert select(problem(), "auto").name == "cpu"
    assert len(log.records) == 1
    text = log.records[0].getMessage()
    assert text.startswith("using backend 'cpu' (passed over: tpc: ")
    for name, needs in (("tpc", "HPU"), ("triton", "CUDA")):
        reasons = [*backend_named(name).unavailable(), f"the tensors are on 'cpu' (needs {needs})"]
        assert f"{name}: {'; '.join(reasons)}" in text
    assert "torch:" not in text
    assert log.records[0].levelno == logging.INFO


def test_auto_without_numba_takes_torch_and_says_so(installed, log):
    installed()
    cost = torch.rand(2, 3, 4)
    out = otfuse.sinkhorn(cost, 0.3)
    assert len(log.records) == 1
    assert log.records[0].getMessage().startswith("using backend 'torch'")
    assert NO_NUMBA in log.records[0].getMessage()
    assert torch.equal(out.plan, otfuse.sinkhorn(cost, 0.3, backend="torch").plan)


def test_auto_off_the_cpu_takes_torch(installed, log):
    installed("numba")
    assert select(problem("meta"), "auto").name == "torch"
    assert "cpu: the tensors are on 'meta' (needs CPU)" in log.records[0].getMessage()


def test_a_name_logs_nothing(log):
    select(problem(), "torch")
    assert not log.records


@pytest.mark.parametrize("name", ["torch", "cpu", "auto"])
def test_a_failure_while_running_propagates(name, installed, monkeypatch):
    """No other backend is tried: a wrong kernel must not hide behind a slow one."""
    installed("numba")
    backend = backend_named("cpu" if name == "auto" else name)
    others = [other for other in BACKENDS if other is not backend]

    def fail(*_):
        raise ZeroDivisionError("from inside")

    def never(*_):
        raise AssertionError("another backend was tried")

    for method in ("solve", "solve_cost", "solve_tokens", "attend"):
        monkeypatch.setattr(type(backend), method, fail)
        for other in others:
            monkeypatch.setattr(type(other), method, never)
    with pytest.raises(ZeroDivisionError, match="from inside"):
        otfuse.sinkhorn(torch.zeros(1, 2, 2), 0.1, backend=name)
    with pytest.raises(ZeroDivisionError, match="from inside"):
        otfuse.sinkhorn_attend(torch.ones(1, 2, 2), torch.ones(1, 2, 2), backend=name)


class NoReading(TorchDispatchMode):
    """No operation at all may run, so no value can be looked at."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_the_choice_reads_no_tensor(name, installed):
    installed("numba")
    x, y, a = torch.zeros(2, 3, 8), torch.zeros(2, 4, 8), torch.zeros(2, 3)
    with NoReading():
        asked = token_problem(x, y, a, None, SolveOptions(0.1, 5), "cosine", "plan", False)
        if name in ("tpc", "triton"):
            with pytest.raises(otfuse.BackendError):
                select(asked, name)
        else:
            assert select(asked, name).name == name.replace("auto", "cpu")


def test_that_test_can_fail():
    value = torch.zeros(1)
    with pytest.raises(AssertionError, match=r"aten\._local_scalar_dense"), NoReading():
        value.item()


def test_the_choice_is_made_at_every_call(installed):
    """From the tensors, never from what an earlier call chose."""
    installed("numba")
    assert [select(problem(device), "auto").name for device in ("cpu", "meta", "cpu")] == ["cpu", "torch", "cpu"]
    installed()
    assert select(problem(), "auto").name == "torch"


def test_an_option_that_a_backend_does_not_know_is_refused(monkeypatch):
    """A new one is plain PyTorch's first; at its default it hinders nobody."""
    monkeypatch.setitem(base.OPTIONS, "reach", None)
    with_reach = [types.SimpleNamespace(**asdict(SolveOptions(0.1)), reach=reach) for reach in (None, 0.5)]
    without, asked = (replace(problem(), options=options) for options in with_reach)
    assert all("it has no option reach" not in backend.unsupported(without) for backend in BACKENDS)
    knowing = [backend.name for backend in BACKENDS if "it has no option reach" not in backend.unsupported(asked)]
    assert knowing == ["torch"] and select(asked, "auto").name == "torch"
