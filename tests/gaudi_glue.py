"""The glue library as the graph compiler calls it, through ctypes; and what its kernels take, written down once more.

``SIGNATURES`` stands beside the table of kernels/tpc/glue/kernels.hpp on purpose: a mistake there is not repeated here.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_bool, c_char, c_double, c_float, c_int8, c_int32, c_uint16, c_uint32, c_uint64
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

GAUDI, GRECO, GAUDI2, GAUDI3 = 1, 2, 3, 4
DEVICES = {"gaudi2": GAUDI2, "gaudi3": GAUDI3}
F32, BF16, I32 = 1 << 12, 1 << 8, 1 << 10
DTYPES = {torch.float32: F32, torch.bfloat16: BF16, torch.int32: I32}
SUCCESS, NODE_NOT_FOUND, INPUT_COUNT, INPUT_SIZE, OUTPUT_COUNT, OUTPUT_SIZE, DATA_TYPE = 0, 1, 3, 4, 5, 6, 7
UNSUPPORTED, ELF_BUFFER, MISSING_STRUCTURE, FAILED = 8, 18, 19, 400
MAX_DIMS = 25


class Guid(Structure):
    _fields_ = [("name", c_char * 64), ("hash", c_uint64), ("properties", c_uint32)]


class UserParams(Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", c_uint32)]


class Geometry(Structure):
    _fields_ = [
        ("dims", c_uint32),
        ("max_sizes", c_uint64 * MAX_DIMS),
        ("min_sizes", c_uint64 * MAX_DIMS),
        ("dtype", c_uint32),
    ]

    @property
    def shape(self) -> tuple[int, ...]:
        """As torch writes it."""
        return tuple(reversed(self.max_sizes[: self.dims]))


class GlueTensor(Structure):
    _fields_ = [
        ("geometry", Geometry),
        ("zero_point", c_int8),
        ("quantization_scale", c_double),
        ("layout", c_char * MAX_DIMS),
        ("flags", c_uint32),
        ("data", ctypes.c_void_p),
        ("permutation", c_uint32 * MAX_DIMS),
        ("reserved", c_uint32 * 6),
    ]


class Mapping(Structure):
    _fields_ = [("dim", c_uint32), ("a", c_float), ("start", c_float), ("end", c_float), ("all_required", c_bool)]


class Access(Structure):
    _fields_ = [
        ("value", c_uint32),
        ("mapping", Mapping * MAX_DIMS),
        ("memset", c_uint64),
        ("reserved", c_uint32 * 6),
    ]


class Params(Structure):
    _fields_ = [
        ("api_version", c_int32),
        ("device", c_uint32),
        ("guid", Guid),
        ("node_params", UserParams),
        ("inputs", POINTER(GlueTensor)),
        ("num_inputs", c_uint32),
        ("outputs", POINTER(GlueTensor)),
        ("num_outputs", c_uint32),
        ("max_tpc", c_uint32),
        ("deterministic", c_uint32),
        ("node_id", c_uint64),
        ("debug", c_uint32),
        ("valid_inputs", c_uint16),
        ("valid_outputs", c_uint16),
        ("reserved", c_uint32 * 24),
    ]


class DeviceKernel(Structure):
    _fields_ = [("elf", ctypes.c_void_p), ("elf_size", c_uint32), ("scalars", c_uint32 * 32), ("num_scalars", c_uint32)]


class Instance(Structure):
    _fields_ = [
        ("rank", c_uint32),
        ("index_space", c_uint64 * 5),
        ("input_access", POINTER(Access)),
        ("output_access", POINTER(Access)),
        ("aux", ctypes.c_void_p),
        ("num_aux", c_uint32),
        ("kernel", DeviceKernel),
        ("preferred_split", c_uint32),
        ("reserved", c_uint32 * 15),
    ]


class ShapeInfo(Structure):
    _fields_ = [("geometry", Geometry), ("host", ctypes.c_void_p), ("reserved", c_uint32 * 8)]


class ShapeParams(Structure):
    _fields_ = [
        ("api_version", c_int32),
        ("node_id", c_uint64),
        ("guid", Guid),
        ("inputs", POINTER(POINTER(ShapeInfo))),
        ("num_inputs", c_uint32),
        ("node_params", UserParams),
        ("num_outputs", c_uint32),
        ("input_permutations", ctypes.c_void_p),
        ("output_permutations", ctypes.c_void_p),
        ("pointed_guid", POINTER(Guid)),
        ("max_tpc", c_uint32),
        ("reserved", c_uint32 * 3),
    ]


class ShapeOutput(Structure):
    _fields_ = [
        ("outputs", POINTER(POINTER(ShapeInfo))),
        ("invalid", POINTER(c_uint32)),
        ("reserved", c_uint32 * 6),
    ]


class Spec(NamedTuple):
    """A tensor of a call."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Signature(NamedTuple):
    """What a kernel takes and gives for a problem, in order."""

    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    scalars: dict[str, float]  # an int or a float
    index_space: tuple[int, ...]


def signature(kernel: str, dtype: torch.dtype, B: int, N: int, M: int, T: int = 3, tiles: int = 1) -> Signature:
    """Of a kernel for B items of N x M and T rounds; ``tiles`` of ``unroll``, its column tiles a slice."""

    def f32(*shape: int) -> Spec:
        return Spec(shape, torch.float32)

    def values(*shape: int) -> Spec:
        return Spec(shape, dtype)

    problem = {"values": values(B, M, N), "a": f32(B, N), "b": f32(B, M)}
    solution = {"plan": values(B, M, N), "f": f32(B, N), "g": f32(B, M), "report": f32(B, 2)}
    history = f32(B, T, 128 * (-(-N // 64) + -(-M // 64)))
    solver: dict[str, float] = {"scale": -10.0, "num_iters": T, "tol": 0.0}
    with_form = {**problem, "form": f32(B, 1)}
    to_differentiate = {
        **with_form, "report": f32(B, 2), "history": history,
        "grad_plan": values(B, M, N), "grad_f": f32(B, N), "grad_g": f32(B, M),
    }  # fmt: skip
    gradients = {"grad_values": values(B, M, N), "grad_a": f32(B, N), "grad_b": f32(B, M)}
    slices = -(-M // (4 * tiles))
    last = {"values": values(N, M, B), "a": f32(N, B), "b": f32(M, B)}
    solution_last = {"plan": values(N, M, B), "f": f32(N, B), "g": f32(M, B), "report": f32(2, B)}
    return {
        "survey": Signature(problem, {"form": f32(B, 1)}, {"scale": -10.0}, (B,)),
        "sinkhorn": Signature(with_form, solution, solver, (B,)),
        "sinkhorn_history": Signature(with_form, {**solution, "history": history}, {**solver, "kept": T}, (B,)),
        "unroll": Signature(to_differentiate, gradients, {"scale": -10.0, "slice": tiles}, (slices, B)),
        "implicit": Signature(to_differentiate, gradients, {"scale": -10.0, "steps": min(N, M) + 20}, (B,)),
        "small": Signature(last, solution_last, {**solver, "fold_every": 8}, (-(-B // 64),)),
    }[kernel]


KERNELS = ("survey", "sinkhorn", "sinkhorn_history", "unroll", "implicit", "small")


def words(scalars: dict[str, float]) -> bytes:
    """One word for each scalar: an int, or the bits of a float32."""
    return b"".join(struct.pack("<i" if isinstance(value, int) else "<f", value) for value in scalars.values())


class Glue:
    """The library's entry points."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.GetLibVersion.restype = c_uint64

    def guids(self, device: int, room: int) -> tuple[int, list[str]]:
        """The count that comes back, and the names written into ``room`` places."""
        count, names = c_uint32(room), (Guid * max(room, 1))()
        given = names if room else None
        assert self._library.GetKernelGuids(device, ctypes.byref(count), given) == SUCCESS
        return count.value, [guid.name.decode() for guid in names if guid.name]

    def instantiate(self, call: Call) -> int:
        return self._library.InstantiateTpcKernel(ctypes.byref(call.params), ctypes.byref(call.instance))

    def infer_shapes(
        self, guid: str, inputs: Sequence[Spec], data: bytes, num_outputs: int, pointed: bool = False
    ) -> tuple[int, list[tuple[int, ...]]]:
        """The code, and the shapes of the outputs."""
        given, asked = (ShapeInfo * max(len(inputs), 1))(), (ShapeInfo * max(num_outputs, 1))()
        for info, spec in zip(given, inputs):
            describe(info.geometry, spec)
        buffer = ctypes.create_string_buffer(data, len(data))
        params, output = ShapeParams(), ShapeOutput()
        name = Guid(name=guid.encode())
        params.guid, params.pointed_guid = (Guid(name=b"other"), ctypes.pointer(name)) if pointed else (name, None)
        params.inputs = (POINTER(ShapeInfo) * len(given))(*map(ctypes.pointer, given))
        params.num_inputs, params.num_outputs = len(inputs), num_outputs
        params.node_params = UserParams(ctypes.cast(buffer, ctypes.c_void_p), len(data))
        output.outputs = (POINTER(ShapeInfo) * len(asked))(*map(ctypes.pointer, asked))
        code = self._library.GetShapeInference(GAUDI2, ctypes.byref(params), ctypes.byref(output))
        return code, [info.geometry.shape for info in asked[:num_outputs]]

    @property
    def version(self) -> int:
        return self._library.GetLibVersion()

    def with_nothing(self) -> list[int]:
        """The codes of every entry point for null pointers."""
        count = c_uint32(0)
        return [
            self._library.GetKernelGuids(GAUDI2, None, None),
            self._library.GetKernelGuids(GAUDI2, ctypes.byref(count), None),
            self._library.InstantiateTpcKernel(None, None),
            self._library.GetShapeInference(GAUDI2, None, None),
        ]


class Call:
    """One node of a graph: what goes to the glue, with room for what comes back."""

    def __init__(
        self, guid: str, inputs: Sequence[Spec], outputs: Sequence[Spec], data: bytes,
        device: int = GAUDI2, elf_room: int = 1 << 20,
    ) -> None:  # fmt: skip
        self.inputs = (GlueTensor * max(len(inputs), 1))()
        self.outputs = (GlueTensor * max(len(outputs), 1))()
        for tensor, spec in zip([*self.inputs, *self.outputs], [*inputs, *outputs]):
            describe(tensor.geometry, spec)
        self.input_access, self.output_access = (Access * 16)(), (Access * 16)()
        self.elf = ctypes.create_string_buffer(b"\x5a" * elf_room, max(elf_room, 1))
        self.data = ctypes.create_string_buffer(data, len(data))
        self.params, self.instance = Params(), Instance()
        self.params.device, self.params.guid = device, Guid(name=guid.encode())
        self.params.node_params = UserParams(ctypes.cast(self.data, ctypes.c_void_p), len(data))
        self.params.inputs, self.params.num_inputs = self.inputs, len(inputs)
        self.params.outputs, self.params.num_outputs = self.outputs, len(outputs)
        self.params.max_tpc = 24
        self.instance.input_access, self.instance.output_access = self.input_access, self.output_access
        self.instance.num_aux = 16
        self.instance.kernel.elf = ctypes.cast(self.elf, ctypes.c_void_p)
        self.instance.kernel.elf_size = elf_room

    @property
    def index_space(self) -> tuple[int, ...]:
        return tuple(self.instance.index_space[: self.instance.rank])

    @property
    def scalars(self) -> bytes:
        kernel = self.instance.kernel
        return bytes(kernel.scalars)[: 4 * kernel.num_scalars]

    def box(self, output: bool, tensor: int, member: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """What the glue says that a member touches of a tensor, per dimension, fastest first; inside the tensor."""
        access = (self.output_access if output else self.input_access)[tensor]
        geometry = (self.outputs if output else self.inputs)[tensor].geometry
        box = []
        for mapping, size in zip(access.mapping[: geometry.dims], geometry.max_sizes):
            first = mapping.a * member[mapping.dim]
            box.append((max(0, int(first + mapping.start)), min(size - 1, int(first + mapping.end))))
        return tuple(box)


def call(kernel: str, wanted: Signature, **options: int) -> Call:
    guid = f"otfuse_{kernel}"
    return Call(guid, [*wanted.inputs.values()], [*wanted.outputs.values()], words(wanted.scalars), **options)


def describe(geometry: Geometry, spec: Spec) -> None:
    geometry.dims, geometry.dtype = len(spec.shape), DTYPES[spec.dtype]
    for place, size in enumerate(reversed(spec.shape)):
        geometry.max_sizes[place] = geometry.min_sizes[place] = size


def new(spec: Spec) -> Tensor:
    return torch.zeros(spec.shape, dtype=spec.dtype)


# Similarity; the kernel; both attends, and their gradients; its gradient; those of the similarity.
PRODUCTS = ("sinkhorn_history", "unroll", 1, 6, 2)


def products_around_kernels(called: Sequence[str]) -> tuple[str | int, ...]:
    """The two kernels among the ops of a forward and backward, and the matrix products before, between and after."""
    full = [name for name in called if "." in name]
    names = [name.split(".")[1] for name in full]
    first, last = (i for i, name in enumerate(full) if name.startswith("otfuse"))
    products = [i for i, name in enumerate(names) if name in ("bmm", "baddbmm", "mm")]
    between = sum(first < i < last for i in products)
    return names[first], names[last], sum(i < first for i in products), between, sum(last < i for i in products)
