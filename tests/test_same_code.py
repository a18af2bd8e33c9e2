"""Which kernels a change of the device code leaves as they were; the change is made to what git is said to hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]

CHANGED = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import ahead_of_time, same_code
from ahead_of_time import Row

def git(command, *arguments):
    if command == "ls-tree":
        return " ".join(f"kernels/triton/{path.name}" for path in ahead_of_time.KERNELS.glob("*.py"))
    text = (ahead_of_time.KERNELS / Path(arguments[0]).name).read_text()
    return "# another line\\n" + text.replace("GROWN = tl.constexpr(256.0)", "GROWN = tl.constexpr(128.0)")

same_code._git = git
rows = [Row(name, "float32", (32, 32), "sm_90") for name in ("forward, cost", "similarity", "loss")]
table = {"rows": {row.variant: {"float32": {"32x32": {"sm_90": [1, 0, 2, 0, 0, 0]}}} for row in rows}}
print(json.dumps([row.variant for row in ahead_of_time.unchanged(rows, table, "a revision")]))
print("same_code" in sys.modules and same_code.OLD in sys.modules)
"""


def test_a_constant_of_the_rounds_changes_the_forward_alone():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CHANGED, str(ROOT / "benchmarks")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *_, same, left_behind = done.stdout.splitlines()
    assert json.loads(same) == ["similarity", "loss"] and left_behind == "False"
