"""The rules of the machine, each broken on purpose, and what the emulator records: boxes, counts, chains."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from otfuse._backends.tpc import emulator
from otfuse._backends.tpc.emulator import EmulatorError

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason=f"no C++ compiler: {emulator.HOW_TO_GET_ONE}")

# Tensors: 64 x 4 numbers each; one member a row.
BREAKS = """
__local__ float64 kept[4];
void main(tensor from, tensor halves, tensor to, tensor rows, int which, int c0, int c1) {
  const int5 first = get_index_space_offset();
  const int5 last = get_index_space_size() + first;
  for (int row = first[0]; row < last[0]; row++) {
    int5 at = {c0, c1, 0, 0, 0};
    int5 own = {0, row, 0, 0, 0};
    const float64 x = v_f32_ld_tnsr_b(own, from);
    v_f32_st_tnsr(own, rows, x);
    if (which == 1) v_f32_st_tnsr(at, from, x);
    if (which == 2) v_f32_st_tnsr(own, to, v_f32_ld_tnsr_b(at, rows));
    if (which == 3) v_f32_st_tnsr(at, to, x);
    if (which == 4) s_f32_st_g(gen_addr(own, to), s_f32_ld_g(gen_addr(at, from)));
    if (which == 5) s_f32_st_g(gen_addr(own, to), s_f32_ld_g((__global float*)gen_addr(own, from) - 1 - 64 * row));
    if (which == 6) s_f32_st_g(gen_addr(own, from), 1.0f);
    if (which == 7) v_f32_st_tnsr(own, to, kept[c0]);
    if (which == 8) v_f32_st_tnsr(own, to, v_f32_ld_tnsr_b(own, halves));
    if (which == 9) v_f32_st_tnsr(own, to, v_f32_add_b(x, x, 2));
    if (which == 10) v_f32_st_tnsr_partial(own, to, x, 60, 10);
    if (which == 11) v_f32_st_tnsr(own, to, v_f32_ld_tnsr_b(own, c0));
    if (which == 12) v_f32_st_tnsr(own, to, v_f32_mov_group_b(x, 0xFF, 63, x));
    if (which == 13) v_f32_st_tnsr(own, to, (float64)(float)get_dim_size(from, c0));
    if (which == 14)
      v_f32_st_tnsr(own, to, v_f32_mov_dual_group_all_b(x, 0xFFFFFFFF, c0, 0, 0, 0, MkWrA(3, 0, 0, 0), x));
  }
}
"""
RUN_TIME = {
    "store to an input": (1, 0, 1, "input", "from", (0, 1, 0, 0, 0)),
    "vector load after vector store": (2, 0, 1, "load after store", "rows", (0, 1, 0, 0, 0)),
    "address outside a tensor": (4, 0, 4, "bounds", "from", (0, 4, 0, 0, 0)),
    "negative address": (4, -1, 0, "bounds", "from", (-1, 0, 0, 0, 0)),
    "access beside all tensors": (5, 0, 0, "bounds", None, None),
    "scalar store to an input": (6, 0, 0, "input", "from", None),
    "index outside local memory": (7, 5, 0, "bounds", None, None),
    "negative index": (7, -1, 0, "bounds", None, None),
    "another element type": (8, 0, 0, "dtype", "halves", None),
    "unknown switch": (9, 0, 0, "subset", None, None),
    "partial store past the vector": (10, 0, 0, "bounds", "to", None),
    "no such tensor": (11, 4, 0, "tensor", None, None),
    "byte mask": (12, 0, 0, "subset", None, None),
    "no such dimension": (13, 5, 0, "tensor", "from", None),
    "no such dual group": (14, 4, 0, "subset", None, None),
}


def written(folder: Path, text: str, name: str = "kernel") -> Path:
    path = folder / f"{name}.c"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def breaks(tmp_path_factory):
    return emulator.kernel(written(tmp_path_factory.mktemp("kernels"), BREAKS, "breaks"))


def rows(dtype=torch.float32):
    return torch.arange(4 * 64).view(4, 64).to(dtype)


def launch(kernel, which, c0=0, c1=0, **options):
    tensors = [rows(), rows(torch.bfloat16), torch.zeros(4, 64), torch.zeros(4, 64)]
    kernel.run(tensors, [which, c0, c1], [4], outputs=2, **options)
    return tensors


@pytest.mark.parametrize("name", RUN_TIME)
def test_a_broken_rule_names_kernel_rule_tensor_and_coordinates(breaks, name):
    which, c0, c1, rule, tensor, coordinates = RUN_TIME[name]
    assert torch.equal(launch(breaks, 0)[3], rows()), "the same kernel breaks none by itself"
    for seed in range(3):  # in whatever boxes and order
        with pytest.raises(EmulatorError) as caught:
            launch(breaks, which, c0, c1, seed=seed)
        error = caught.value
        assert (error.kernel, error.rule, error.tensor) == ("breaks", rule, tensor)
        assert coordinates is None or error.coordinates == coordinates
        text = str(error)
        assert text.startswith(f"TPC kernel 'breaks' breaks the rule '{rule}'")
        assert tensor is None or f"tensor '{tensor}'" in text
        assert f"seed {seed}" in text
    assert torch.equal(launch(breaks, 0)[3], rows()), "and is none the worse for it"


@pytest.mark.parametrize("default", ["cpu", "meta"])  # torch's default device is nothing to the emulator
def test_an_element_of_two_members(breaks, default):
    """Whose order nobody knows. Caught wherever they come in two calls, as they always do one by one."""
    tensors = [rows(), rows(torch.bfloat16), torch.zeros(4, 64), torch.zeros(4, 64)]
    with pytest.raises(EmulatorError, match=r"rule 'member', tensor 'to' at \[0, 2, 0, 0, 0\]"), torch.device(default):
        breaks.touched(tensors, [3, 0, 2], [4], outputs=2)


def kernel_of(body: str, parameters: str = "tensor from, tensor to", before: str = "") -> str:
    return f"""{before}
void main({parameters}) {{
  const int5 at = {{0, 0, 0, 0, 0}};
  float64 x = v_f32_ld_tnsr_b(at, 0);
  {body}
  v_f32_st_tnsr(at, 1, x);
}}
"""


VECTORS, NUMBERS = "__local__ float64 kept[{}];", "__local__ float kept[{}];"
CALLS_ITSELF = "static int f(int n) { return n ? f(n - 1) : 0; }"
CALL_EACH_OTHER = """
static int g(int n);
static int f(int n) { return g(n); }
static int g(int n) { if (n > 0) { return f(n - 1); } return 0; }
"""
MANY = "tensor from, tensor to, " + ", ".join(f"int s{i}" for i in range(33))
COMPILE_TIME = {
    "a lane by index": (kernel_of("float s = x[0]; x = s;"), "compiles"),
    "a lane by conversion": (kernel_of("float s = x; x = s;"), "compiles"),
    "a lane by address": (kernel_of("float s = *(float*)&x; x = s;"), "no lane to scalar"),
    "a lane by a pointer": (
        kernel_of("float *s = (float*)kept; x = s[3];", before=VECTORS.format(2)),
        "no lane to scalar",
    ),
    "a lane by an implicit pointer": (kernel_of("const float* s = &x; x = s[0];"), "compiles"),
    "a branch on a vector": (kernel_of("if (x) x = 1.0f;"), "compiles"),
    "a branch on a mask": (kernel_of("if (v_f32_cmp_geq_b(x, x)) x = 1.0f;"), "compiles"),
    "the emulator's own access": (kernel_of("x = emu::lanes(x)[0];"), "language"),
    "vector division": (kernel_of("x = x / x;"), "compiles"),
    "double": (kernel_of("double s = 2.0; x = (float)s;"), "language"),
    "a number that is double": (kernel_of("x = x * 2.0;"), "compiles"),
    "scalars promoted to double": (kernel_of("float s = 1.0f; x = (float)(s * 0.1);"), "compiles"),
    "a reference": (kernel_of("f(x);", before="static void f(float64& y) { y = y + y; }"), "language"),
    "a reference to a struct": (
        kernel_of("", before="typedef struct { int n; } shape; static void f(shape &s) { s.n = 1; }"),
        "language",
    ),
    "a lambda": (kernel_of("auto f = [](float64 y) { return y; }; x = f(x);"), "language"),
    "long": (kernel_of("long n = 3; x = (float)n;"), "language"),
    "recursion": (kernel_of("x = (float)f(3);", before=CALLS_ITSELF), "no recursion"),
    "recursion by way of another": (kernel_of("x = (float)f(3);", before=CALL_EACH_OTHER), "no recursion"),
    "a function that is not in the subset": (kernel_of("x = v_f32_tanh_b(x);"), "compiles"),
    "more vectors than fit": (kernel_of("kept[0] = x;", before=VECTORS.format(321)), "compiles"),
    "more scalars than fit": (kernel_of("kept[0] = 1.0f;", before=NUMBERS.format(4097)), "compiles"),
    "17 tensors": (kernel_of("", ", ".join(f"tensor t{i}" for i in range(17))), "compiles"),
    "33 scalars": (kernel_of("", MANY), "compiles"),
    "a scalar that is no word": (kernel_of("", "tensor from, tensor to, short s"), "compiles"),
    "no main": ("void run(tensor t) {}", "language"),
}


@pytest.mark.parametrize("name", COMPILE_TIME)
def test_what_tpc_c_does_not_have_does_not_compile(tmp_path, name):
    text, rule = COMPILE_TIME[name]
    with pytest.raises(EmulatorError) as caught:
        emulator.kernel(written(tmp_path, text))
    assert caught.value.rule == rule and str(caught.value).startswith("TPC kernel 'kernel' breaks")
    if rule == "compiles":
        assert "error" in str(caught.value), "the compiler's own words are shown"


def test_local_memory_up_to_its_limit(tmp_path):
    """80 KB of vectors and 16 KB of scalars; a LOOKUP takes all but 16 KB of the vectors."""
    full = kernel_of("kept[0] = x; x = kept[0];", before="__local__ float64 kept[320];\n__local__ float numbers[4096];")
    assert emulator.kernel(written(tmp_path, full, "full")).vector_bytes == 320 * 256
    # Nobody knows the tables, so no kernel with a LOOKUP compiles; the limit is told from the others.
    looked_up = "kept[0] = x; x = v_f32_lookup(kept[0], 1, 0, x, 1, 0);"
    for vectors, exceeds in ((64, False), (65, True)):
        path = written(tmp_path, kernel_of(looked_up, before=f"__local__ float64 kept[{vectors}];"), f"lookup{vectors}")
        with pytest.raises(EmulatorError, match="v_f32_lookup") as caught:
            emulator.kernel(path)
        assert ("the kernel's vectors exceed local memory" in str(caught.value)) == exceeds


def test_a_launch_is_checked(breaks):
    good = [rows(), rows(torch.bfloat16), torch.zeros(4, 64), torch.zeros(4, 64)]
    cases = [
        ((good[:3], [0, 0, 0], [4]), "takes 4 tensors (from, halves, to, rows); got 3"),
        ((good, [0, 0], [4]), "takes 3 scalars (which, c0, c1); got 2"),
        ((good, [0, 0, 0], [4, 0]), r"an index space has at most five dimensions of at least one member"),
        ((good, [0, 0, 0], [1] * 6), r"an index space has at most five dimensions"),
        (([rows().double(), *good[1:]], [0, 0, 0], [4]), "'from' has dtype torch.float64"),
        (([rows().mT, *good[1:]], [0, 0, 0], [4]), "'from' must be a contiguous CPU tensor"),
        (([rows().view(1, 1, 1, 1, 4, 64), *good[1:]], [0, 0, 0], [4]), "of at most five dimensions"),
    ]
    for arguments, message in cases:
        with pytest.raises(EmulatorError) as caught:
            breaks.run(*arguments, outputs=2)
        assert message in str(caught.value)


MEMBERS = """
__local__ float64 sum[1];
void main(tensor from, tensor to, tensor boxes, int times) {
  const int5 first = get_index_space_offset();
  const int5 last = get_index_space_size() + first;
  sum[0] = 0.0f;
  for (int j = first[1]; j < last[1]; j++) {
    for (int i = first[0]; i < last[0]; i++) {
      int5 at = {64 * i, j, 0, 0, 0};
      float64 x = v_f32_ld_tnsr_b(at, from);
      for (int t = 0; t < times; t++) x = v_f32_mac_b(x, x, x);
      for (int t = 0; t < times; t++) x = v_f32_mul_b(x, x);
      sum[0] = sum[0] + x;
      v_f32_st_tnsr(at, to, x);
      int5 place = {i, j, 0, 0, 0};
      s_f32_st_tnsr_s(place, boxes, (float)((last[0] - first[0]) * (last[1] - first[1])));
    }
  }
}
"""


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return written(tmp_path_factory.mktemp("kernels"), MEMBERS, "members")


def test_members_run_in_random_boxes_and_order(members):
    kernel, sizes = emulator.kernel(members), set()
    for seed in range(20):
        tensors = [torch.rand(5, 100), torch.zeros(5, 100), torch.zeros(5, 2)]
        kernel.run(tensors, [0], [2, 5], outputs=2, seed=seed)
        assert torch.equal(tensors[1], tensors[0]), "whatever the boxes"
        sizes.add(tuple(tensors[2].flatten().tolist()))
        if seed == 0:
            assert sizes == {(10.0,) * 10}, "all members in one box"
    assert len(sizes) > 5 and {1.0, 10.0} <= {size for run in sizes for size in run}


def test_boxes_that_a_member_touched(members):
    """Clipped to what exists: the second vector of a row reaches past its end."""
    tensors = [torch.rand(5, 100), torch.zeros(5, 100), torch.zeros(5, 2)]
    touched = emulator.kernel(members).touched(tensors, [0], [2, 5], outputs=2)
    assert [t.member[:2] for t in touched] == [(i, j) for j in range(5) for i in range(2)]
    for t in touched:
        i, j = t.member[:2]
        row = ((64 * i, min(64 * i + 63, 99)), (j, j))
        assert t.loaded == {"from": row} and t.stored == {"to": row, "boxes": ((i, i), (j, j))}


def test_counts_and_chains(members):
    """A mac that feeds the next by a factor takes 6 cycles, as a mul does; by the accumulator alone 4."""
    kernel = emulator.kernel(members, count=True)
    tensors = [torch.rand(1, 64), torch.zeros(1, 64), torch.zeros(1, 1)]
    counts = [kernel.count(tensors, [times], [1, 1], outputs=2) for times in (0, 1, 3)]
    for times, count in zip((0, 1, 3), counts):
        assert count.operations.get("v_f32_mac", 0) == count.operations.get("v_f32_mul", 0) == times
        assert count.operations["v_f32_ld_tnsr"] == count.operations["local load"] == 1
        assert count.operations["local store"] == 2 and count.operations["v_f32_st_tnsr"] == 1
        assert count.slots == {"load": 2, "scalar": 0, "vector": 1 + 2 * times, "store": 4}
        assert count.chain == max(1 + 4 + 4 + 1, 4 + 12 * times + 4 + 1)  # by the sum's first store, or by x
        assert count.ordered >= count.chain
    wide = [torch.rand(5, 100), torch.zeros(5, 100), torch.zeros(5, 2)]
    apart, together = (kernel.count(wide, [1], [2, 5], outputs=2, together=how) for how in (False, True))
    assert apart.operations["local store"] == 10 + 10 and together.operations["local store"] == 1 + 10
    assert apart.operations["v_f32_mac"] == together.operations["v_f32_mac"] == 10
    with pytest.raises(AssertionError, match="count=True"):
        emulator.kernel(members).count(tensors, [1], [1, 1], outputs=2)


def test_an_accumulator_is_wanted_later(tmp_path):
    text = kernel_of("float64 s = 0.0f; for (int t = 0; t < n; t++) s = v_f32_mac_b(x, x, s); x = s;",
                     "tensor from, tensor to, int n")  # fmt: skip
    kernel = emulator.kernel(written(tmp_path, text), count=True)
    chains = [kernel.count([torch.rand(64), torch.zeros(64)], [n], [1], outputs=1).chain for n in (1, 2, 10)]
    assert chains[1] - chains[0] == 4 and chains[2] - chains[1] == 8 * 4


def test_the_cache_follows_the_source_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = written(tmp_path, kernel_of("x = x + 1.0f;"))
    emulator._kernel.cache_clear()
    first = emulator._library(path, (), False, False)
    assert first.parent == tmp_path / "cache" / "otfuse" / "tpc" and first.exists()
    stamp = first.stat().st_mtime_ns
    assert emulator._library(path, (), False, False) == first and first.stat().st_mtime_ns == stamp
    path.write_text(kernel_of("x = x + 2.0f;"))
    assert emulator._library(path, (), False, False) != first
    assert len(list(first.parent.iterdir())) == 2, "and nothing is left lying about"


def _compile_in_a_process(path):
    return emulator._library(path, (), False, False)


def test_processes_that_compile_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = written(tmp_path, kernel_of("x = x + 1.0f;"))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        made = pool.map(_compile_in_a_process, [path] * 2)
    assert len(set(made)) == 1 and list(made[0].parent.iterdir()) == [made[0]]
    out = torch.zeros(64)
    emulator.Kernel("kernel", made[0], False).run([torch.ones(64), out], [], [1], outputs=1)
    assert (out == 2).all()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EmulatorError, match=r"cannot write to .*set XDG_CACHE_HOME"):
        emulator._library(emulator.sources() / "gaudi2/survey_f32.c", (), False, False)


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "COMPILER", None)
    with pytest.raises(EmulatorError, match=r"there is no C\+\+ compiler .*install g\+\+"):
        emulator.kernel(written(tmp_path, kernel_of("")))
