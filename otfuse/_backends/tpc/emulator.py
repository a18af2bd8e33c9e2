"""Runs a TPC-C kernel on the host: compiles its source with the emulator of ``kernels/tpc/emulator``, and calls it.

Compiled kernels stay in a folder of the user's cache, under a name made of everything that went in. Every rule of the
machine that a kernel breaks is an :class:`EmulatorError` naming kernel, rule, tensor and coordinates.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPILERS = ("g++", "clang++", "c++")
COMPILER = next((path for name in COMPILERS if (path := shutil.which(name))), None)
HOW_TO_GET_ONE = "install g++"
FLAGS = [
    "-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-fno-exceptions",
    "-fno-rtti", "-fno-threadsafe-statics", "-fsanitize=bounds", "-fPIC", "-shared", "-fvisibility=hidden",
    "-Wl,--as-needed", "-Wno-unknown-warning-option", "-Wall", "-Werror", "-Wdouble-promotion",
    "-Wno-unknown-pragmas", "-Wno-unused", "-Wno-narrowing", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
]  # fmt: skip
MAX_RANK = 5
MAX_VLM, MAX_VLM_WITH_LOOKUP = 81920, 16384
NOT_TPC_C = (
    r"emu|EMU_\w*|std|double|long|asm|goto|union|auto|template|typename|class|namespace|using|operator|constexpr|nullptr|"
    r"new|delete|this|throw|try|catch|private|public|virtual|decltype|\w+_cast"
)
TYPES = r"float|int|unsigned|bool|char|u?int\d+_t|u?int64|float64|bool64|\w*float128|u?char256|int5|tensor"
SLOTS = ("load", "scalar", "vector", "store")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}


class EmulatorError(RuntimeError):
    """A kernel that does not compile, or broke a rule of the machine while it ran."""

    def __init__(
        self, kernel: str, rule: str, text: str, tensor: str | None = None, coordinates: tuple[int, ...] | None = None
    ) -> None:
        self.kernel, self.rule, self.tensor, self.coordinates = kernel, rule, tensor, coordinates
        where = "" if tensor is None else f", tensor '{tensor}'"
        where += "" if coordinates is None else f" at {list(coordinates)}"
        super().__init__(f"TPC kernel '{kernel}' breaks the rule '{rule}'{where}: {text}")


class Counts(NamedTuple):
    """What a launch issued."""

    slots: dict[str, int]  # load, scalar, vector, store
    operations: dict[str, int]  # by intrinsic or operator
    chain: int  # cycles of the longest chain of operations that wait for each other
    ordered: int  # cycles if issued in the order of the source, one operation a slot and cycle


class Touched(NamedTuple):
    """What an index-space member read and stored of each tensor."""

    member: tuple[int, ...]  # five coordinates
    loaded: dict[str, tuple[tuple[int, int], ...]]  # by tensor, per dimension, fastest first: lowest and highest
    stored: dict[str, tuple[tuple[int, int], ...]]


def sources() -> Path:
    """The folder with kernels and emulator: ``kernels/tpc`` of the repository, or where a wheel put it."""
    return Path(str(files("otfuse.kernels.tpc")))


@contextlib.contextmanager
def variant() -> Iterator[None]:
    """Within, kernels run in the other variant of what is not documented: two roundings a mac, and see emulator.h."""
    global _variant
    before, _variant = _variant, True
    try:
        yield
    finally:
        _variant = before


_variant = False
_lock = threading.Lock()  # an emulated machine runs one kernel at a time


def kernel(path: str | os.PathLike[str], defines: Sequence[str] = (), *, count: bool = False) -> Kernel:
    """The kernel of a source file, compiled if it was not before.

    Args:
        path: of the TPC-C source; relative to ``kernels/tpc``, or absolute.
        defines: macros for the compiler, ``NAME`` or ``NAME=VALUE``; the device's ``__gaudi2__`` among them.
        count: compile the variant that counts operations.

    Raises:
        EmulatorError: there is no compiler, or it refuses the source.
    """
    return _kernel(sources() / path, tuple(defines), count, _variant)


@cache
def _kernel(path: Path, defines: tuple[str, ...], count: bool, other: bool) -> Kernel:
    return Kernel(path.stem, _library(path, defines, count, other), count)


class Kernel:
    """A kernel compiled for the host."""

    def __init__(self, name: str, library: Path, count: bool) -> None:
        self.name, self.counts_operations = name, count
        self._library = ctypes.CDLL(str(library))
        self._library.otfuse_tpc_parameters.restype = ctypes.c_char_p
        self._library.otfuse_tpc_vector_bytes.restype = ctypes.c_int64
        parameters = self._library.otfuse_tpc_parameters().decode().split()
        # Names of the source, in order.
        self.tensors = tuple(p[len("tensor:") :] for p in parameters if p.startswith("tensor:"))
        self.scalars = tuple(p.partition(":")[2] for p in parameters if not p.startswith("tensor:"))
        self._floats = tuple(p.startswith("float:") for p in parameters if not p.startswith("tensor:"))
        self.vector_bytes: int = self._library.otfuse_tpc_vector_bytes()  # of local memory

    def run(
        self,
        tensors: Sequence[Tensor],
        scalars: Sequence[float],
        index_space: Sequence[int],
        outputs: int,
        seed: int | None = None,
    ) -> None:
        """Run all members of an index space, in random boxes and order.

        Args:
            tensors: contiguous, on the CPU, in the order of the kernel's parameters.
            scalars: the parameters after them.
            index_space: members per dimension, at most five.
            outputs: how many tensors, at the end, the kernel may store to.
            seed: of boxes and order; a random one if None, named when a rule is broken. 0: all members in one box.

        Raises:
            EmulatorError: the kernel broke a rule.
        """
        self._launch(tensors, scalars, index_space, outputs, random.getrandbits(32) if seed is None else seed, None)

    def touched(
        self, tensors: Sequence[Tensor], scalars: Sequence[float], index_space: Sequence[int], outputs: int
    ) -> list[Touched]:
        """Run member by member, and say what each touched; a tensor that it did not touch is left out."""
        space = _padded(index_space)
        members = [tuple(reversed(m)) for m in _product(tuple(reversed(space)))]
        boxes = torch.empty(len(members), len(tensors), 2, 2, MAX_RANK, dtype=torch.int32, device="cpu")
        self._launch(tensors, scalars, index_space, outputs, 0, boxes)
        record = boxes.tolist()
        return [
            Touched(member, *(self._boxes(record[i], access, tensors) for access in (0, 1)))
            for i, member in enumerate(members)
        ]

    def _boxes(self, record: Any, access: int, tensors: Sequence[Tensor]) -> dict[str, tuple[tuple[int, int], ...]]:
        found = {}
        for name, accesses, tensor in zip(self.tensors, record, tensors):
            low, high = accesses[access]
            if high[0] >= 0:
                found[name] = tuple(zip(low, high))[: tensor.dim()]
        return found

    def count(
        self,
        tensors: Sequence[Tensor],
        scalars: Sequence[float],
        index_space: Sequence[int],
        outputs: int,
        together: bool = False,
    ) -> Counts:
        """Run member by member, or all members ``together`` in one box, and say what was issued.

        Needs a kernel made with ``count=True``.
        """
        assert self.counts_operations, "make the kernel with count=True"
        members = len(_product(_padded(index_space)))
        shape = (members, len(tensors), 2, 2, MAX_RANK)
        boxes = None if together else torch.empty(shape, dtype=torch.int32, device="cpu")
        self._library.otfuse_tpc_reset_counts()
        self._launch(tensors, scalars, index_space, outputs, 0, boxes)
        numbers = (ctypes.c_int64 * 6)()
        next_counter, operation = self._library.otfuse_tpc_counts, self._library.otfuse_tpc_operation
        next_counter.restype = operation.restype = ctypes.c_void_p
        handle = next_counter(numbers)
        operations: dict[str, int] = {}
        name, slot, number = ctypes.c_char_p(), ctypes.c_int32(), ctypes.c_int64()
        while handle:
            handle = operation(ctypes.c_void_p(handle), ctypes.byref(name), ctypes.byref(slot), ctypes.byref(number))
            assert name.value is not None
            key = name.value.decode()
            if number.value:
                operations[key] = operations.get(key, 0) + number.value
        return Counts(dict(zip(SLOTS, numbers[:4])), operations, numbers[4], numbers[5])

    def _launch(
        self, tensors: Sequence[Tensor], scalars: Sequence[float], index_space: Sequence[int], outputs: int,
        seed: int, boxes: Tensor | None,
    ) -> None:  # fmt: skip
        self._check(tensors, scalars, index_space)
        described = (_Tensor * len(tensors))()
        alive = []
        for position, (tensor, description) in enumerate(zip(tensors, described)):
            writer = None
            if position >= len(tensors) - outputs:
                writer = torch.zeros(tensor.numel(), dtype=torch.int32, device="cpu")
                alive.append(writer)
            _describe(description, tensor, writer)
        words = b"".join(struct.pack("<f" if f else "<i", v) for f, v in zip(self._floats, scalars))
        violation = _Violation()
        with _lock:
            broken = self._library.otfuse_tpc_run(
                described, len(tensors), words, (ctypes.c_int32 * MAX_RANK)(*_padded(index_space)),
                ctypes.c_uint64(seed), ctypes.c_void_p(None if boxes is None else boxes.data_ptr()),
                ctypes.byref(violation),
            )  # fmt: skip
        if broken:
            self._raise(violation, seed)

    def _check(self, tensors: Sequence[Tensor], scalars: Sequence[float], index_space: Sequence[int]) -> None:
        problem = None
        if len(tensors) != len(self.tensors):
            problem = f"takes {len(self.tensors)} tensors ({', '.join(self.tensors)}); got {len(tensors)}"
        elif len(scalars) != len(self.scalars):
            problem = f"takes {len(self.scalars)} scalars ({', '.join(self.scalars)}); got {len(scalars)}"
        elif len(index_space) > MAX_RANK or min(index_space, default=1) < 1:
            problem = f"an index space has at most five dimensions of at least one member; got {list(index_space)}"
        for name, tensor in zip(self.tensors, tensors):
            if tensor.dim() > MAX_RANK or not tensor.is_contiguous() or tensor.device.type != "cpu":
                problem = f"'{name}' must be a contiguous CPU tensor of at most five dimensions"
            elif tensor.dtype not in DTYPES:
                problem = f"'{name}' has dtype {tensor.dtype}; a tensor is float32, bfloat16 or int32"
        if problem:
            raise EmulatorError(self.name, "launch", problem)

    def _raise(self, violation: _Violation, seed: int) -> None:
        text = f"{violation.text.decode()} (seed {seed})"
        tensor = self.tensors[violation.tensor] if violation.tensor >= 0 else None
        at = tuple(violation.coordinates) if violation.has_coordinates else None
        raise EmulatorError(self.name, violation.rule.decode(), text, tensor, at)


class _Tensor(ctypes.Structure):
    """As emu::Tensor lays it out."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("writer", ctypes.c_void_p),
        ("size", ctypes.c_int64 * MAX_RANK),
        ("stride", ctypes.c_int64 * MAX_RANK),
        ("dtype", ctypes.c_int32),
        ("pad", ctypes.c_float),
    ]


class _Violation(ctypes.Structure):
    """As emu::Violation lays it out."""

    _fields_ = [
        ("rule", ctypes.c_char * 64),
        ("text", ctypes.c_char * 512),
        ("tensor", ctypes.c_int32),
        ("has_coordinates", ctypes.c_int32),
        ("coordinates", ctypes.c_int32 * MAX_RANK),
    ]


def _describe(description: _Tensor, tensor: Tensor, writer: Tensor | None) -> None:
    """A torch tensor as the machine sees it: dimensions the other way round, those above the rank of size one."""
    above = MAX_RANK - tensor.dim()
    description.data = tensor.data_ptr()
    description.writer = None if writer is None else writer.data_ptr()
    description.size = (ctypes.c_int64 * MAX_RANK)(*reversed(tensor.shape), *[1] * above)
    description.stride = (ctypes.c_int64 * MAX_RANK)(*reversed(tensor.stride()), *[0] * above)
    description.dtype = DTYPES[tensor.dtype]
    description.pad = 0.0


def _padded(index_space: Sequence[int]) -> list[int]:
    return [*index_space, *[1] * (MAX_RANK - len(index_space))]


def _product(space: Sequence[int]) -> list[tuple[int, ...]]:
    members: list[tuple[int, ...]] = [()]
    for size in space:
        members = [(*member, i) for member in members for i in range(size)]
    return members


def _library(path: Path, defines: tuple[str, ...], count: bool, other: bool) -> Path:
    """The compiled kernel, from the cache where it is there."""
    found = COMPILER
    if found is None:
        raise EmulatorError(
            path.stem, "compiler", f"there is no C++ compiler ({', '.join(COMPILERS)}); {HOW_TO_GET_ONE}"
        )
    flags = [*FLAGS, "-D__TPC__", *(f"-D{define}" for define in defines)]
    flags += ["-DOTFUSE_TPC_COUNT"] if count else []
    flags += ["-DOTFUSE_TPC_VARIANT"] if other else []
    if _version(found, "__clang_major__") >= 8 or _version(found, "__GNUC__") >= 12:
        flags.append("-ftrivial-auto-var-init=pattern")  # a register without contents holds no zero
    text = _preprocessed(found, path, flags)
    digest = hashlib.sha256()
    for part in (found, _target(found), *flags, text, *_headers()):
        digest.update(part.encode() + b"\0")
    target = cache_folder() / f"{path.stem}-{digest.hexdigest()[:24]}.so"
    if not target.exists():
        _compile(found, flags, _translation_unit(path, text), path.stem, target)
    return target


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "otfuse" / "tpc"


@cache
def _target(compiler: str) -> str:
    """Everything the compiler predefines: its version, and the instructions of this processor."""
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _version(compiler: str, macro: str) -> int:
    found = re.search(rf"#define {macro} (\d+)", _target(compiler))
    return int(found.group(1)) if found else 0


@cache
def _headers() -> tuple[str, ...]:
    return tuple(path.read_text() for path in sorted((sources() / "emulator").glob("*.h")))


def _preprocessed(compiler: str, path: Path, flags: Sequence[str]) -> str:
    """The source after macros and includes, in which names and declarations can be found."""
    defines = [flag for flag in flags if flag.startswith("-D")]
    return _output([compiler, "-E", "-P", "-x", "c++", *defines, *_include("include"), str(path)], path.stem)


def _include(*folders: str) -> list[str]:
    return [f"-I{sources() / folder}" for folder in folders]


def _output(command: Sequence[str], name: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise EmulatorError(name, "compiles", f"{' '.join(command)} failed:\n{run.stderr}")
    return run.stdout


def _compile(compiler: str, flags: Sequence[str], unit: str, name: str, target: Path) -> None:
    """Compile beside the target and rename, so that no other process ever sees half a file."""
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".compile-", dir=target.parent)
    except OSError as error:
        raise EmulatorError(
            name, "cache", f"cannot write to {target.parent} ({error}); set XDG_CACHE_HOME to a folder of yours"
        ) from error
    try:
        source, made = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(unit)
        _output([compiler, *flags, *_include("emulator", "include"), str(source), "-o", str(made)], name)
        os.replace(made, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _translation_unit(path: Path, text: str) -> str:
    """The emulator around the kernel's source."""
    _check_language(path.stem, text)
    names = re.findall(r"__local__\s+(?:\w+\s+)+(\w+)\s*[\[;=]", text)
    lookup = re.search(r"\bv_\w*(?:lookup|lut_entry|reduce)\w*\s*\(", text)
    signature = " ".join(_parameters(path.stem, text))
    return "\n".join(
        [
            '#include "emulator.h"',
            "#define main tpc_main",
            f'#include "{path}"',
            "#undef main",
            f"#define EMU_SOURCE_LOCALS(EACH) {' '.join(f'EACH({name})' for name in names)}",
            f"#define EMU_SOURCE_VLM {MAX_VLM_WITH_LOOKUP if lookup else MAX_VLM}",
            f'#define EMU_SOURCE_SIGNATURE "{signature}"',
            '#include "runner.h"',
            "",
        ]
    )


def _parameters(name: str, text: str) -> list[str]:
    """Kind and name of the parameters of ``main``, as ``kind:name``."""
    main = re.search(r"\bvoid\s+main\s*\(([^)]*)\)", text)
    if main is None:
        raise EmulatorError(name, "language", "there is no void main(...)")
    found = [declaration.replace("const", " ").split() for declaration in main.group(1).split(",")]
    return [f"{' '.join(words[:-1]).replace(' ', '_')}:{words[-1]}" for words in found]


def _check_language(name: str, text: str) -> None:
    """What C++ takes and TPC-C does not, beyond what the emulator's types refuse."""
    if bad := re.search(rf"\b({NOT_TPC_C})\b", text):
        raise EmulatorError(name, "language", f"'{bad.group()}' is not in the subset")
    types = "|".join([TYPES, *re.findall(r"\}\s*(\w+)\s*;", text)])
    if bad := re.search(rf"\b(?:{types})\s*&\s*\w+", text):
        raise EmulatorError(name, "language", f"'{bad.group()}' is a reference")
    if bad := re.search(r"\(\s*(?:const\s+)?(?:float|u?int\d*_t|int|unsigned|char|short|bool)\s*\*+\s*\)", text):
        raise EmulatorError(
            name, "no lane to scalar", f"the cast {bad.group()} makes a scalar pointer; global memory has __global"
        )
    if cycle := _recursion(text):
        raise EmulatorError(name, "no recursion", " calls ".join(cycle))


def _recursion(text: str) -> list[str]:
    """Functions that call each other in a circle."""
    bodies = {}
    for match in re.finditer(r"\b(\w+)\s*\([^(){};]*\)\s*\{", text):
        if match.group(1) in ("if", "for", "while", "switch"):
            continue
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        bodies[match.group(1)] = set(re.findall(r"\b(\w+)\s*\(", text[match.end() : end]))

    def search(function: str, path: list[str]) -> list[str]:
        if function in path:
            return [*path[path.index(function) :], function]
        for called in sorted(bodies[function] & bodies.keys()):
            if found := search(called, [*path, function]):
                return found
        return []

    return next((found for function in bodies if (found := search(function, []))), [])
