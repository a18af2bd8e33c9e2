"""A Gaudi that is not there: tensors that say device 'hpu' and hold their numbers on the CPU.

An op of ours goes to the kernel that the built library registers for HPU; from there to the stand-in for Habana's
plugin, which asks the built glue for index space and parameters, as the graph compiler would, and lets the emulator run
the kernel. Every other op of torch runs on the numbers as they are.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int64, c_uint64, c_void_p
from typing import Any, ClassVar

import gaudi_glue
import pytest
import torch
from gaudi_glue import Call, Glue, Spec
from gaudi_libraries import libraries, plugin
from torch import Tensor
from torch.utils._pytree import tree_map

from otfuse._backends import base
from otfuse._backends.tpc import emulator
from otfuse._backends.tpc import library as _tpc_library


class Argument(ctypes.Structure):
    """As tests/stand_in_sdk/stand_in_plugin.cpp lays it out."""

    _fields_ = [("data", c_void_p), ("dims", c_int64), ("sizes", c_int64 * 5), ("bfloat16", c_int64)]

    def tensor(self) -> Tensor:
        """The same memory."""
        shape, dtype = self.sizes[: self.dims], torch.bfloat16 if self.bfloat16 else torch.float32
        count = torch.Size(shape).numel()
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.data)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


EXECUTOR = ctypes.CFUNCTYPE(None, c_char_p, c_void_p, c_uint64, ctypes.POINTER(Argument), c_uint64, c_uint64)


class Gaudi:
    """What the plugin hands on: runs it as the glue says, and keeps the guids."""

    def __init__(self) -> None:
        self.glue, self.guids, self.failure = Glue(libraries()[0]), [], None
        self._callback = EXECUTOR(self._execute)  # kept alive with this object
        self._plugin = ctypes.CDLL(str(plugin()))
        self._plugin.stand_in_execute_with(self._callback)

    def _execute(self, guid: bytes, data: int, size: int, arguments: Any, inputs: int, outputs: int) -> None:
        try:
            self._launch(
                guid.decode(), ctypes.string_at(data, size), [arguments[i] for i in range(inputs + outputs)], inputs
            )
        except BaseException as error:  # cannot cross C++; raised by whoever asked
            self.failure = error

    def _launch(self, guid: str, data: bytes, arguments: list[Argument], inputs: int) -> None:
        self.guids.append(guid)
        tensors = [argument.tensor() for argument in arguments]
        specs = [Spec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        node = Call(guid, specs[:inputs], specs[inputs:], data)
        code = self.glue.instantiate(node)
        assert code == gaudi_glue.SUCCESS, f"the glue answers {guid} by code {code}"
        elf = node.elf.raw[: node.instance.kernel.elf_size].decode().split("\n")
        source = elf[elf.index("-c") + 1].partition("kernels/tpc/")[2]
        kernel = emulator.kernel(source, ("__gaudi2__",))
        scalars = [
            ctypes.c_float.from_buffer_copy(word).value if real else ctypes.c_int32.from_buffer_copy(word).value
            for word, real in zip((node.scalars[i : i + 4] for i in range(0, len(node.scalars), 4)), kernel._floats)
        ]
        kernel.run(tensors, scalars, node.index_space, len(tensors) - inputs)

    def check(self) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


gaudi: Gaudi | None = None


class HpuTensor(Tensor):
    """Says that it is on 'hpu:0'."""

    numbers: Tensor
    called: ClassVar[list[str]] = []  # every op, in order

    @staticmethod
    def __new__(cls, numbers: Tensor) -> HpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device="hpu:0",
        )  # fmt: skip
        made.numbers = numbers
        return made

    def __repr__(self) -> str:
        return f"HpuTensor({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        def on_cpu(value: Any) -> Any:
            if isinstance(value, HpuTensor):
                return value.numbers
            if isinstance(value, torch.device) and value.type == "hpu":
                return torch.device("cpu")
            return value

        cls.called.append(str(op))
        plain, named = tree_map(on_cpu, args), tree_map(on_cpu, kwargs or {})
        if op.namespace == "otfuse_tpc":
            results = op._op_dk(torch._C.DispatchKey.HPU, *plain)
            assert gaudi is not None
            gaudi.check()
        else:
            results = op(*plain, **named)
            if op._schema.is_mutable and op._schema.name.endswith("_"):
                return args[0]
            if (
                op is torch.ops.aten._to_copy.default
                and torch.device((kwargs or {}).get("device") or "hpu").type == "cpu"
            ):
                return results
        return tree_map(lambda value: HpuTensor(value) if isinstance(value, Tensor) else value, results)


_factories = torch.library.Library("aten", "IMPL")


def _new(op: Any) -> Any:
    """A factory of torch, for the device 'hpu'."""

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> HpuTensor:
        return HpuTensor(op(*args, **kwargs, device="cpu"))

    return make


for _name in ("empty.memory_format", "empty_strided"):  # what all others are made of
    _packet, _, _overload = _name.partition(".")
    _factories.impl(_name, _new(getattr(getattr(torch.ops.aten, _packet), _overload or "default")), "HPU")


@contextmanager
def stand_in_gaudi(patch: pytest.MonkeyPatch) -> Iterator[Gaudi]:
    """Within, a Gaudi is found, its libraries are built, and it runs what it is given."""
    global gaudi
    glue, _ = libraries()
    patch.setattr(_tpc_library, "folder", lambda: glue.parent)
    patch.setitem(base._installed, "habana_frameworks", True)
    hpu = types.ModuleType("torch.hpu")
    answers = {"is_available": True, "is_initialized": False, "current_device": 0, "device_count": 1}
    for name, answer in {**answers, "_lazy_init": None}.items():
        setattr(hpu, name, functools.partial(lambda answer: answer, answer))
    patch.setitem(sys.modules, "torch.hpu", hpu)
    patch.setattr(torch, "hpu", hpu, raising=False)
    patch.setenv("GC_KERNEL_PATH", f"{glue}:libtpc_kernels.so")
    gaudi = Gaudi()
    try:
        yield gaudi
    finally:
        gaudi = None
