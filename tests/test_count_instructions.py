"""Counts from the machine code: on a listing made by hand, and of the iterations of the main case."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.compiler.instructions import instructions, loops, straight, table

ROOT = Path(__file__).parents[1]

# A loop within a loop, with a branch around two instructions, one that leaves, one for diverged warps, and a comment.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
        /*0010*/                   FADD R2, R2, R3 ;             /* 0x0000000302027221 */
        /*0020*/                   SHFL.BFLY PT, R3, R2, 0x2, 0x1f ;
        /*0030*/                   BRA.DIV UR4, 0x00a0 ;
        /*0040*/               @P0 BRA 0x0070 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   LDS.128 R4, [R5] ;
        /*0070*/                   NOP ;
        /*0080*/               @P1 BRA 0x0010 ;
        /*0090*/              @!P2 BRA 0x0000 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   SHFL.BFLY PT, R3, R2, 0x2, 0x1f ;
        /*00c0*/                   BRA 0x0040 ;
"""


def test_ways_through_a_loop():
    """Behind the end stands what diverged warps do, whose way back is no loop."""
    (loop,) = loops(instructions(SASS))
    assert (loop.start, loop.end) == (0x10, 0x80)
    assert loop.shortest == {"all": 5, "shuffles": 1}
    assert loop.longest == {"all": 7, "shuffles": 1, "barriers": 1, "shared": 1}
    assert straight(instructions(SASS)) == {"all": 8, "shuffles": 1}
    assert table("iterations", instructions(SASS)) == [
        "| iterations | 1 | 5 to 7 | 1 | 0 to 1 | 0 to 1 | 0 |",
        "| iterations | whole | 8 | 1 | 0 | 0 | 0 |",
    ]


COUNT = """
import json, sys
from collections import Counter
from benchmarks.compiler.instructions import loops, machine_code, straight
if __name__ == "__main__":
    name, dtype, N, M = sys.argv[1:]
    code = machine_code(name, dtype, (int(N), int(M)), "sm_90")
    print(json.dumps([[loop.shortest for loop in loops(code)], straight(code), Counter(one.mnemonic for one in code)]))
"""


def counted(*arguments):
    """In a process of its own: the shortest ways through the loops, through the kernel, and all mnemonics."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_iteration_crosses_the_warps_once():
    """One turn through shared memory: a barrier before it, and one after. Triton's own sums take two (column_sums)."""
    loops, _, _ = counted("forward, inference", "bfloat16", 64, 32)
    *_, iteration, _, _ = loops  # the attends come last
    assert iteration["barriers"] == 2 and iteration["shuffles"] <= 20 and iteration["all"] < 150
    similarity, *of_any_length = loops[:-3]  # again, where a token is so long or so short that its square is no number
    assert similarity["all"] > iteration["all"] and of_any_length


def test_an_iteration_of_a_small_element_is_nothing_but_its_multiply_adds():
    """16 multiply-adds or products a side, 8 reciprocals, 8 times a weight, 3 of the loop; no other thread is asked.

    Around the loop some hundred go to the offsets of rows.
    """
    (iteration, logarithms), whole, mnemonics = counted("small, inference", "float32", 4, 4)
    assert iteration == {"all": 2 * 16 + 8 + 8 + 3, "special": 8}
    assert whole["all"] <= 650 and iteration["all"] < 200 < logarithms["all"]
    # A row of a cost at once, in either form; all but error and iterations is stored so too.
    loads, stores = ({name: n for name, n in mnemonics.items() if name.startswith(kind)} for kind in ("LDG", "STG"))
    assert loads == {"LDG.E.128": 8} and stores == {"STG.E": 2, "STG.E.128": 6}
