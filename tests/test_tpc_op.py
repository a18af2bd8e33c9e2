"""The ops for Gaudi: compiled against torch and a stand-in for Habana's plugin, called through the dispatcher."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from gaudi_glue import KERNELS, PRODUCTS, products_around_kernels, signature
from torch._dynamo.backends.common import aot_autograd

import otfuse
from otfuse._backends.tpc import ops as tpc_ops
from otfuse.testing import clustered_tokens

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="the ops are compiled by c++, for Linux"
)
TESTS = Path(__file__).parent

ALONE = """
import json, sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
torch.ops.load_library(sys.argv[1])
assert "otfuse" not in sys.modules
told = {}
for name, (inputs, scalars) in json.loads(sys.argv[2]).items():
    op = getattr(torch.ops.otfuse_tpc, name)
    results = op(*[torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for shape, dtype in inputs], *scalars)
    results = [results] if isinstance(results, torch.Tensor) else results
    told[name] = [str(op.default._schema), [[list(r.shape), str(r.dtype)] for r in results]]
from torch.fx.experimental.symbolic_shapes import ShapeEnv
mode = FakeTensorMode(shape_env=ShapeEnv())
inputs = [mode.from_tensor(torch.empty(shape), static_shapes=False) for shape in [(3, 20, 64), (3, 64), (3, 20)]]
with mode:
    form = torch.ops.otfuse_tpc.survey(*inputs, 1.0)
    told["symbolic"] = [type(form.shape[0]).__name__, int(form.shape[0]), int(form.shape[1])]
print(json.dumps(told))
"""


def test_schemas_and_shapes_of_the_library_alone():
    """With no Python of ours: the C++ table says the same as the table of otfuse/tpc_ops.py, and as the tests'."""
    from gaudi_libraries import libraries

    wanted = {kernel: signature(kernel, torch.bfloat16, 3, 7, 5) for kernel in KERNELS}
    asked = {
        kernel: [[[s.shape, str(s.dtype)[6:]] for s in w.inputs.values()], list(w.scalars.values())]
        for kernel, w in wanted.items()
    }
    command = [sys.executable, "-c", ALONE, str(libraries()[1]), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("symbolic") == ["SymInt", 3, 1]
    assert set(told) == set(KERNELS) == set(tpc_ops.KERNELS)
    for kernel, (schema, outputs) in told.items():
        assert schema == str(getattr(torch.ops.otfuse_tpc, kernel).default._schema)
        assert outputs == [[list(s.shape), str(s.dtype)] for s in wanted[kernel].outputs.values()]


def run_pytest(*arguments):
    """pytest in a process of its own, from the repository's root; what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_on_a_stand_in_for_a_gaudi():
    """Numbers, gradients, refusals and graphs of tensors that say 'hpu': tests/on_stand_in_gaudi.py, which see."""
    code, said = run_pytest(str(TESTS / "on_stand_in_gaudi.py"))
    assert code == 0, said


def test_contract_tests_with_device_hpu():
    """``python -m pytest --device hpu``, on the stand-in: some of the tests that every backend has to pass."""
    files = [str(TESTS / name) for name in ("test_nn.py", "test_isolation.py")]
    some = "tpc and dtype1 and not autocast and not without_mass or test_nn and tpc"
    code, said = run_pytest("-p", "gaudi_session", "--device", "hpu", *files, "-k", some)
    assert code == 0, said
    assert int(re.search(r"(\d+) passed", said).group(1)) > 10, said


@pytest.mark.skipif(importlib.util.find_spec("habana_frameworks") is not None, reason="Habana's PyTorch is here")
def test_device_hpu_without_habanas_pytorch():
    code, said = run_pytest("--device", "hpu", str(TESTS / "test_nn.py"))
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--device hpu needs Habana's PyTorch" in said and "docs/gaudi.md" in said


def test_compiled_to_one_graph_with_the_products_in_it():
    """On CPU tensors, where torch.compile can be run: the same Python as on a Gaudi, forward and backward."""
    called = []

    def keep(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    def loss(x, y):
        out = otfuse.sinkhorn_attend(x, y, 0.1, num_iters=5, backend="tpc")
        return out.x.square().sum() + out.y.square().sum()

    x, y = (t.requires_grad_() for t in clustered_tokens(2, 18, 7, 24, seed=3))
    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(x, y).backward()
    assert products_around_kernels(called) == PRODUCTS
