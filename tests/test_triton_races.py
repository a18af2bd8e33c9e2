"""What the threads of a program tell each other through memory, found in the compiler's own code.

The interpreter has one thread, and compute-sanitizer's racecheck looks at shared memory alone: a race through device
memory would show on neither. Where a vector is shorter than there are threads, several of them hold, and load, the same
number, and one stores it: who is late then reads what has been stored. That is harmless only if nothing but the same
store comes of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
IN_PLACE = ("streaming, backward: gradients", "streaming, backward: gather")
COMPILE = """
import json, sys
from benchmarks.compiler import table
for name in json.loads(sys.argv[1]):
    row = table.typical_row(name)._replace(dtype="float32")
    compiled = table.compile_launch(table.LAUNCHES[name], row.dtype, table.configured(row), row.target)
    print(json.dumps(compiled.asm["ttgir"]))
"""


def held_by_several(text: str) -> list[str]:
    """Loads of what is stored at the same addresses later on, with no barrier in between, in a layout that has more
    threads along a dimension than numbers."""
    layouts = {
        name: [math.prod(pair) for pair in zip(*(json.loads(list_of) for list_of in (threads, warps)))]
        for name, threads, warps in re.findall(
            r"(#\w+) = #ttg\.blocked<\{.*?threadsPerWarp = (\[.*?\]), warpsPerCTA = (\[.*?\])", text
        )
    }
    found, loaded = [], {}
    for line in text.splitlines():
        if "barrier" in line:
            loaded = {}
        if load := re.search(r"tt\.load (%[\w#]+)", line):
            loaded[load[1]] = line
        store = re.search(r"tt\.store (%[\w#]+),.* : tensor<([\dx]+)x!tt\.ptr<\w+>, (#\w+)>", line)
        if store and store[1] in loaded and store[3] in layouts:
            sides = [int(side) for side in store[2].split("x")]
            if any(side < threads for side, threads in zip(sides, layouts[store[3]])):
                found.append(line.strip())
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(IN_PLACE)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_vectors_that_are_changed_in_place_have_a_thread_for_every_number(texts):
    for name, text in zip(IN_PLACE, texts, strict=True):
        assert "tt.store" in text and re.search(r"tt\.load", text), name
        assert not held_by_several(text), name


def test_that_a_vector_held_by_several_is_seen(texts):
    """The same code for so many more warps; and with a barrier where there is none."""
    more = [re.sub(r"warpsPerCTA = \[4\]", "warpsPerCTA = [16]", text) for text in texts]
    assert all(map(held_by_several, more))
    assert not any(held_by_several(re.sub(r"( +)(tt\.store)", r"\1ttg.barrier all\n\1\2", text)) for text in more)
