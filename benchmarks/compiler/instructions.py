"""What one warp executes in each loop of a kernel and around it, counted in the machine code, without a GPU.

``python -m benchmarks.compiler.instructions [LAUNCH …] [--dtype bfloat16] [--tile 64x32] [--target sm_90]`` compiles
launches of table.py, disassembles them with the tool that comes with Triton, and prints a table: innermost loops in the
order of the code, with the shortest and the longest way through each (of the iterations those are an element in scaling
form, and one in log-domain form whose scalings are looked at); and the shortest way through the kernel, on which each
loop is gone through once at most. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks.compiler.table import LAUNCHES, Row, compile_launch, configured

# What is counted besides all instructions: the part of a mnemonic before its first dot.
KINDS = {"shuffles": ("SHFL",), "barriers": ("BAR",), "shared": ("LDS", "STS", "LDSM", "STSM"), "special": ("MUFU",)}
DEFAULT = ("forward, inference", "forward", "backward")


class Instruction(NamedTuple):
    address: int
    mnemonic: str
    target: int | None  # of a branch
    always: bool  # taken by every thread that comes here


class Loop(NamedTuple):
    """The innermost ones; counts of instructions by kind, ``all`` among them."""

    start: int
    end: int
    shortest: Counter[str]
    longest: Counter[str]


def disassemble(cubin: bytes) -> str:
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> list[Instruction]:
    found = []
    for address, guard, mnemonic, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@\S+ )?([A-Z][\w.]*)([^;]*);", sass):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if mnemonic == "BRA" else None
        found.append(Instruction(int(address, 16), mnemonic, int(target[1], 16) if target else None, not guard))
    return found


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """From a branch backwards to where it leads; without what a loop does only where a warp has diverged.

    That stands behind the kernel's end, and the way back from there is no loop.
    """
    end = _end(code)
    ends: dict[int, int] = {}
    for one in code:
        if one.target is not None and one.target < one.address and not (one.always and one.address > end):
            ends[one.target] = max(one.address, ends.get(one.target, 0))
    inner = {
        (start, end) for start, end in ends.items() if not any(start < other and ends[other] <= end for other in ends)
    }
    bodies = [(start, end, [one for one in code if start <= one.address <= end]) for start, end in sorted(inner)]
    return [Loop(start, end, _way(body, min), _way(body, max)) for start, end, body in bodies]


def straight(code: Sequence[Instruction]) -> Counter[str]:
    """The shortest way from a kernel's first instruction to its end; of loops on it, one turn."""
    return _way([one for one in code if one.address <= _end(code)], min)


def _end(code: Sequence[Instruction]) -> int:
    return min((one.address for one in code if one.mnemonic == "EXIT" and one.always), default=code[-1].address)


def _way(body: Sequence[Instruction], best: type[min]) -> Counter[str]:
    """The shortest or longest way from the first instruction of a loop to its last."""
    last = body[-1].address
    come: dict[int, Counter[str]] = {body[0].address: Counter()}
    for one, following in zip(body, [*(other.address for other in body[1:]), None]):
        if one.address not in come:
            continue
        counts = come[one.address] + _counted(one)
        if one.address == last:
            return counts
        leads = [one.target] if one.target is not None else []
        if not (one.mnemonic == "BRA" and one.always):
            leads.append(following)
        for place in leads:
            if place is not None and one.address < place <= last:
                come[place] = best(counts, come.get(place, counts), key=lambda counter: counter["all"])
    raise ValueError("no way from the head of this loop to its end")


def _counted(one: Instruction) -> Counter[str]:
    if one.mnemonic == "NOP":
        return Counter()
    return Counter(["all", *(kind for kind, names in KINDS.items() if one.mnemonic.partition(".")[0] in names)])


def machine_code(name: str, dtype: str, tile: tuple[int, int], target: str, **changed: int) -> list[Instruction]:
    """Of a launch as the table configures it, but for what is changed."""
    row = Row(name, dtype, tile, target)
    compiled = compile_launch(LAUNCHES[name], dtype, configured(row) | changed, target)
    return instructions(disassemble(compiled.asm["cubin"]))


def table(name: str, code: Sequence[Instruction]) -> list[str]:
    """Rows of Markdown; where the two ways through a loop differ, both."""
    ways = [(str(number), loop.shortest, loop.longest) for number, loop in enumerate(loops(code), 1)]
    lines = []
    for what, shortest, longest in [*ways, ("whole", straight(code), straight(code))]:
        cells = [name, what]
        for kind in ("all", *KINDS):
            least, most = shortest[kind], longest[kind]
            cells.append(str(least) if least == most else f"{least} to {most}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("launches", nargs="*", default=DEFAULT, metavar="VARIANT", help=f"of {', '.join(LAUNCHES)}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tile", default="64x32", help="BLOCK_N x BLOCK_M")
    parser.add_argument("--target", default="sm_90", help="of NVIDIA")
    for name in ("BLOCK_D", "num_warps", "num_stages"):
        parser.add_argument(f"--{name}", type=int, help="other than configured")
    options = vars(parser.parse_args())
    changed = {name: options[name] for name in ("BLOCK_D", "num_warps", "num_stages") if options[name]}
    N, M = map(int, options["tile"].split("x"))
    print(f"| loop | | instructions | {' | '.join(KINDS)} |", f"|{' --- |' * (3 + len(KINDS))}", sep="\n")
    for name in options["launches"]:
        print(*table(name, machine_code(name, options["dtype"], (N, M), options["target"], **changed)), sep="\n")


if __name__ == "__main__":
    main()
