"""The choice between the Triton backend's paths: total, monotonous, the same forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch

from otfuse._backends.triton import cluster as triton_cluster
from otfuse._backends.triton import version as _triton_version
from otfuse._backends.triton.paths import CLUSTER_PART, Path, cluster_size, fits_on_chip
from otfuse._backends.triton.paths import choose as choose_of

H200, SMALL_CARD = 141 << 30, 8 << 30
NONE, CLUSTERS = 0, 32 * CLUSTER_PART
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def choose(*problem, held=NONE):
    """Of a device without clusters, unless it is said what they hold."""
    return choose_of(*problem, held)


SIDES = sorted({side + step for power in range(15) for side in (2**power,) for step in (-1, 0, 1)} - {0, 2**14 + 1})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [0, 1, 16, 64, 768])
@pytest.mark.parametrize("held", [NONE, CLUSTER_PART, CLUSTERS])
def test_every_size_has_a_path(dtype, D, held):
    """From 1 x 1 to 16384 x 16384, each side by itself; what was off chip stays off when it grows."""
    order = (Path.SMALL, Path.ON_CHIP, Path.CLUSTER, Path.STORED, Path.RECOMPUTED)
    for N in SIDES:
        reached = 0
        for M in SIDES:
            for B in (1, 64, 1_048_576):
                path = choose(B, N, M, D, dtype, H200, held=held)
                assert path in order and (D > 0 or path is not Path.RECOMPUTED)
                assert (path is Path.SMALL) == (D == 0 and N <= 16 and M <= 16)
                assert path is not Path.CLUSTER or (cluster_size(N, M, held) and dtype != torch.float64)
                assert (path is Path.ON_CHIP) == (path is not Path.SMALL and fits_on_chip(N, M, D, dtype))
            place = order.index(choose(1, N, M, D, dtype, H200, held=held))
            assert place >= reached, f"{N} x {M} goes back on chip"
            reached = place


@pytest.mark.parametrize(
    ("sizes", "dtype", "before", "beyond"),
    [
        ((16, 16, 0), torch.float32, Path.SMALL, Path.ON_CHIP),
        ((1, 16, 0), torch.float64, Path.SMALL, Path.ON_CHIP),
        ((128, 128, 0), torch.float32, Path.ON_CHIP, Path.STORED),
        ((64, 256, 0), torch.bfloat16, Path.ON_CHIP, Path.STORED),
        ((64, 64, 0), torch.float64, Path.ON_CHIP, Path.STORED),
        ((128, 128, 768), torch.bfloat16, Path.ON_CHIP, Path.STORED),
        ((32, 256, 768), torch.float32, Path.ON_CHIP, Path.STORED),
        ((128, 128, 16), torch.float32, Path.ON_CHIP, Path.RECOMPUTED),
        ((64, 64, 1), torch.float64, Path.ON_CHIP, Path.STORED),
    ],
    ids=str,
)
def test_where_the_lines_lie(sizes, dtype, before, beyond):
    """One column more is another path, and so is one row more the other way round."""
    N, M, D = sizes
    assert choose(1, N, M, D, dtype, H200) is choose(1, M, N, D, dtype, H200) is before
    assert choose(1, N, M + 1, D, dtype, H200) is choose(1, M + 1, N, D, dtype, H200) is beyond


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, 16), (torch.bfloat16, 64), (torch.float16, 64)], ids=str)
def test_tiles_are_made_again_where_there_are_few_features(dtype, last):
    assert choose(1, 4096, 4096, last, dtype, H200) is Path.RECOMPUTED
    assert choose(1, 4096, 4096, last + 1, dtype, H200) is Path.STORED


def test_tokens_whose_matrix_takes_too_much_memory_are_never_stored():
    """At most a quarter of the device, all items together; a cost is there already, and stays the stored matrix."""
    assert choose(1, 16384, 16384, 768, torch.bfloat16, 4 << 30) is Path.STORED
    assert choose(1, 16384, 16384, 768, torch.bfloat16, (4 << 30) - 1) is Path.RECOMPUTED
    assert choose(4, 16384, 16384, 768, torch.bfloat16, SMALL_CARD) is Path.RECOMPUTED
    assert choose(4, 16384, 16384, 0, torch.float32, SMALL_CARD) is Path.STORED
    assert choose(1, 16384, 16384, 768, torch.float64, SMALL_CARD) is Path.STORED
    assert choose(2, 16384, 16384, 768, torch.float64, SMALL_CARD) is Path.RECOMPUTED


def test_the_batch_decides_nothing_but_what_is_stored():
    for B, (N, M), D in itertools.product((1, 100, 10**6), ((4, 4), (16, 17), (128, 128)), (0, 16, 768)):
        assert choose(B, N, M, D, torch.float32, SMALL_CARD) is choose(1, N, M, D, torch.float32, SMALL_CARD)


@pytest.mark.parametrize(
    ("sizes", "dtype", "size"),
    [
        ((1024, 512), torch.float32, 16),
        ((1000, 500), torch.float32, 16),
        ((512, 512), torch.float32, 16),
        ((512, 257), torch.float32, 16),
        ((129, 129), torch.float32, 4),
        ((128, 129), torch.float16, 2),
        ((1024, 16), torch.float32, 1),
        ((1025, 16), torch.float32, 0),
        ((16, 513), torch.float32, 0),
        ((1024, 513), torch.float32, 0),
    ],
    ids=str,
)
def test_how_many_blocks_an_item_is_spread_over(sizes, dtype, size):
    """And that an item is solved so, of tokens or of a cost, exactly where a cluster holds it."""
    assert cluster_size(*sizes, CLUSTERS) == size
    for D in (0, 768):
        assert (choose(1, *sizes, D, dtype, H200, held=CLUSTERS) is Path.CLUSTER) == (size > 0)
        assert choose(1, *sizes, D, dtype, H200) is Path.STORED
    assert (cluster_size(*sizes, CLUSTER_PART) > 0) == (size == 1)
    assert choose(1, *sizes, 768, torch.float64, H200, held=CLUSTERS) is Path.STORED


def test_a_cluster_reads_a_stored_matrix():
    """Tokens whose similarity may not be stored are recomputed, whatever a cluster holds."""
    assert choose(1000, 512, 512, 768, torch.float32, H200, held=CLUSTERS) is Path.CLUSTER
    assert choose(100_000, 512, 512, 768, torch.float32, H200, held=CLUSTERS) is Path.RECOMPUTED


def test_a_cluster_holds_half_of_a_cost_in_half_precision():
    for sizes, path in (((512, 512), Path.CLUSTER), ((1024, 512), Path.STORED)):
        assert choose(1, *sizes, 0, torch.bfloat16, H200, held=CLUSTERS) is path
        assert choose(1, *sizes, 0, torch.float32, H200, held=CLUSTERS) is Path.CLUSTER
        assert choose(1, *sizes, 768, torch.bfloat16, H200, held=CLUSTERS) is Path.CLUSTER


@pytest.mark.parametrize(
    ("target", "capability", "held"),
    [
        ("sm_90", (9, 0), CLUSTERS),
        ("sm_100", (10, 0), CLUSTERS // 2),
        ("sm_100", (10, 3), CLUSTERS // 2),
        ("sm_100", (13, 0), CLUSTER_PART),
        ("sm_80", (8, 0), CLUSTER_PART),
        ("gfx942", (9, 4), NONE),
        ("interpreter", None, CLUSTERS),
    ],
    ids=str,
)
def test_what_a_cluster_of_a_device_holds(monkeypatch, target, capability, held):
    monkeypatch.setattr(triton_cluster, "target_of", lambda device: target)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    held_by = triton_cluster.held_by.__wrapped__
    monkeypatch.setattr(_triton_version, "VERSION", (3, 9))
    assert held_by(torch.device("cuda", 0)) == held
    monkeypatch.setattr(_triton_version, "VERSION", (3, 8))  # which does not compile their kernels
    assert held_by(torch.device("cuda", 0)) == NONE
