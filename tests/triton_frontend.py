"""What Triton's frontend makes of every kernel, without a GPU and without compiling further; run as a script.

Prints, as JSON, the kernels that were looked at and every fault of the three kinds below, by launch. Triton's
interpreter sees none of them: it runs the kernels as Python, in Python's integers, and rounds every product.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from triton.compiler import ASTSource, code_generator

from benchmarks.compiler import table
from benchmarks.compiler.table import LAUNCHES, PACKAGE, TARGETS
from benchmarks.results import ROOT

# What a launcher may pass for these, beside what a launch has.
CONSTANTS = {
    "STOPS": (False, True),
    "HISTORY": (0, 1, 2),
    "MODE": (0, 1, 2),
    "ASSIGNMENT": (0, 1, 2),
    "CONTRAST": (0, 1),
    "PACK": (False, True),
}
STATE = " history_ptr pull_ptr total_ptr"  # which these constants may ask for

not_carried: list[str] = []
_compound, _carries = code_generator.CodeGenerator.visit_compound_statement, code_generator.CodeGenerator._find_carries


def _remember(self: Any, statements: Any) -> None:
    _compound(self, statements)
    self.left_behind = dict(self.lscope), set(self.local_defs)


def _find_carries(self: Any, node: Any, before: dict[str, Any], ignore: Any = frozenset()) -> Any:
    """Triton carries a name through a loop if its value is another after the body than it was before the loop. A name
    that the loop assigns and that began as the same value as a carried one goes unnoticed: ``before = v`` in the body,
    after ``before = v``, and is then what it was before the loop, whatever v becomes."""
    names, carried, types = _carries(self, node, before, ignore)
    after, assigned = self.left_behind
    for name in sorted(assigned & before.keys() - {*names, *ignore}):
        values = [code_generator.flatten_values_to_ir([scope[name]]) for scope in (before, after)]
        if values[0] == values[1] and any(value in carried for value in values[0]):
            not_carried.append(f"{self.jit_fn.__name__}: {name}, in the loop of line {self.begin_line + node.lineno}")
    return names, carried, types


code_generator.CodeGenerator.visit_compound_statement = _remember
code_generator.CodeGenerator._find_carries = _find_carries


class Value(NamedTuple):
    """Of Triton's code: the operation that makes it, of what, and its type."""

    operation: str
    operands: list[Value]
    names: list[str]
    kind: str
    text: str

    def is_bounded(self) -> bool:
        """Whether a number is known to the compiler, or which part of an item a program is: there are as many as
        features, divided by those of a part."""
        if self.operation == "arith.addi":
            return all(operand.is_bounded() for operand in self.operands)
        return self.operation == "arith.constant" or self.text.startswith(
            ("tt.get_program_id y", "tt.get_program_id z")
        )

    def __str__(self) -> str:
        return f"{self.operation}({', '.join(self.names)}): {self.kind}"


def values_of(code: str) -> Iterator[Value]:
    """In their order, since the regions of a loop have the same names for values of their own."""
    made: dict[str, Value] = {}
    for line in code.splitlines():
        if found := re.match(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)(.*)", line):
            names = re.findall(r"%\w+", found[3])
            operands = [made.get(name, Value("argument", [], [name], "", "")) for name in names]
            made[found[1]] = value = Value(found[2], operands, names, found[3].rpartition(": ")[2], found[2] + found[3])
            yield value


def narrow_products(code: str) -> list[str]:
    """Products of two sizes in 32 bits: of numbers, since those of vectors are places within a tile, times a stride."""
    return [
        " * ".join(map(str, value.operands)) + f": {value.kind}"
        for value in values_of(code)
        if value.operation == "arith.muli" and value.kind == "i32" and not any(of.is_bounded() for of in value.operands)
    ]


def twofold_products(code: str) -> list[str]:
    """Sums of two products with a factor in common: the compiler chooses which of them it rounds."""
    sums = [value for value in values_of(code) if value.operation == "arith.addf" and len(value.operands) == 2]
    pairs = [value.operands for value in sums if all(of.operation == "arith.mulf" for of in value.operands)]
    in_common = [(pair, set(pair[0].names) & set(pair[1].names)) for pair in pairs]
    return [" + ".join(map(str, pair)) for pair, names in in_common if any("cst" not in name for name in names)]


def codes(name: str) -> dict[str, str]:
    """Of a launch: Triton's code by the constants that a launcher may pass."""
    row = table.typical_row(name)
    options, constants = table.launched_with(LAUNCHES[name], table.configured(row))
    launch = LAUNCHES[name]._replace(solution=LAUNCHES[name].solution + STATE)
    choices = {of: values for of, values in CONSTANTS.items() if of in constants}
    found = {}
    for values in itertools.product(*choices.values()):
        passed = dict(zip(choices, values))
        source = table.source(launch, row.dtype, constants | passed)
        found[f"{name} {passed}"] = table.intermediate(source, TARGETS["sm_90"], options)
    return found


def faults(code: str) -> dict[str, Any]:
    """And those of the loops that were looked at since the last time."""
    found = {"not carried": [*not_carried], "narrow": narrow_products(code), "twofold": twofold_products(code)}
    not_carried.clear()
    return {**found, "fused": code.count("math.fma")}


def of_all() -> dict[str, Any]:
    modules = [
        importlib.import_module(f"{PACKAGE}.{path.stem}")
        for path in sorted((ROOT / "otfuse/kernels/triton").glob("[a-z]*.py"))
    ]
    kernels = {name for module in modules for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}
    found = {
        name: {"kernel": LAUNCHES[launch].kernel, **faults(code)}
        for launch in LAUNCHES
        for name, code in codes(launch).items()
    }
    return {"kernels": sorted(kernels), "launches": found}


def of_faulty() -> dict[str, Any]:
    """Of kernels that have the faults, one each, and of their mended twins."""
    import faulty_kernels

    types = {"ptr": "*fp32", "n": "i32", "m": "i32", "high": "fp32", "low": "fp32"}
    found = {}
    for name, kernel in vars(faulty_kernels).items():
        if hasattr(kernel, "arg_names"):
            source = ASTSource(kernel, {of: types[of] for of in kernel.arg_names}, {})
            found[name] = faults(table.intermediate(source, TARGETS["sm_90"], {"num_warps": 4}))
    return found


if __name__ == "__main__":
    print(json.dumps(of_faulty() if sys.argv[1:] == ["faulty"] else of_all()))
