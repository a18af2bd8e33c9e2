"""The model of the Gaudi kernels' time: its arithmetic, the goals, and the table that is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.gaudi import model_table
from otfuse._backends.tpc import emulator
from otfuse.kernels.tpc import model
from otfuse.kernels.tpc.model import GAUDI2, GAUDI3, Work

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
needs_compiler = pytest.mark.skipif(emulator.COMPILER is None, reason="the emulator needs a C++ compiler")
# Goals: vector operations an iteration and element; cycles an iteration that a schedule needs at least, for one element
# alone, and for each of two at once.
MOST_OPERATIONS, MOST_CYCLES, MOST_CYCLES_OF_TWO = 100, 250, 110


@pytest.fixture(scope="module")
def lavcap():
    return model_table.Solver(*(model_table.count_solver("sinkhorn", 64, 20, at_once) for at_once in (2, 1)))


def without_error(row: str) -> list[str]:
    """The cells of a printed row but for the fourth, a rounding error."""
    cells = row.strip("|").split("|")
    return cells[:3] + cells[4:]


class TestArithmetic:
    def test_bounds(self):
        waits, issues = Work(10, 3, 40, 2, 100, 150), Work(10, 3, 140, 2, 100, 300)
        assert (waits.slots, waits.bound, waits.issue_share) == (40, 100, 0.4)
        assert (issues.slots, issues.bound, issues.issue_share) == (140, 140, 1.0)

    def test_rounds(self):
        four, eight = Work(100, 10, 200, 30, 500, 900), Work(140, 14, 360, 30, 900, 1700)
        iteration = model.per_round(four, eight, 4)
        assert iteration == Work(10, 1, 40, 0, 100, 200)
        assert model.with_rounds(eight, 8, iteration, 4) == four
        assert model.with_rounds(eight, 8, iteration, 50).vector == 360 + 42 * 40

    def test_members_take_turns(self):
        assert [model.turns(B, GAUDI2) for B in (1, 24, 25, 64, 256)] == [1, 1, 2, 3, 11]
        assert [model.turns(B, GAUDI3) for B in (64, 65)] == [1, 2]
        assert model.microseconds(1790, 48, GAUDI2) == pytest.approx(2.0)
        assert model.microseconds(1790, 48, GAUDI2, clock_ghz=0.895) == pytest.approx(4.0)

    def test_clocks_are_those_of_the_published_figures(self):
        for machine, tflops in ((GAUDI2, 11), (GAUDI3, 28.7)):
            assert machine.clock_ghz == pytest.approx(tflops * 1e3 / (machine.cores * 128 * 2), abs=0.005)

    def test_traffic(self):
        # Values and plan, a and b, f and g, and three numbers for form and report.
        assert model.solve_bytes(2, 64, 20) == 2 * 4 * (2 * 1280 + 2 * 84 + 3)
        assert model.traffic_us(2.45e6, GAUDI2) == pytest.approx(1.0)
        assert model.traffic_us(6.4e6, GAUDI2, sram=True) == pytest.approx(1.0)

    def test_other_formulations(self):
        ours, bmm, logsumexp = model.formulations(4, 64, 20, 50)
        assert (ours.launches, bmm.launches, logsumexp.launches) == (1, 202, 101)
        matrix = 4 * 4 * 64 * 20
        assert 50 * 2 * matrix < logsumexp.bytes < bmm.bytes < 60 * 2 * matrix
        assert model.formulation_us(bmm, 2.0, GAUDI2) == pytest.approx(404 + bmm.bytes / 6.4e6)
        assert model.formulation_us(ours, 2.0, GAUDI2, work_us=10) == 12

    def test_fusing_the_products(self):
        assert model.attend_cycles(64, 20, 768) == 3 * 15360
        D = model.largest_fused_features(4, 64, 20, 2.0, GAUDI2)
        assert (
            model.attend_gain_us(4, 64, 20, D, 2.0, GAUDI2) >= 0 > model.attend_gain_us(4, 64, 20, D + 1, 2.0, GAUDI2)
        )


@needs_compiler
class TestGoals:
    def test_operations_of_an_iteration(self, lavcap):
        assert 60 < lavcap.one.iteration.vector <= MOST_OPERATIONS
        assert 60 < lavcap.two.iteration.vector / 2 <= MOST_OPERATIONS

    def test_cycles_of_an_iteration(self, lavcap):
        """No schedule is shorter; what a compiler makes of it is not known here."""
        assert lavcap.one.iteration.bound <= MOST_CYCLES
        assert lavcap.two.iteration.bound / 2 <= MOST_CYCLES_OF_TWO

    def test_two_elements_fill_the_slots_that_one_leaves_empty(self, lavcap):
        assert lavcap.two.iteration.issue_share > 1.5 * lavcap.one.iteration.issue_share

    def test_a_core_takes_its_elements_by_twos(self, lavcap):
        one, two = (of.member.bound / (1e3 * GAUDI2.clock_ghz) for of in (lavcap.one, lavcap.two))
        for B, expected in ((24, one), (48, two), (64, two + one), (256, 5 * two + one)):
            assert lavcap.microseconds(B, GAUDI2)[0] == pytest.approx(expected)

    def test_the_printed_table_is_that_of_these_kernels(self, lavcap):
        page = max(BENCHMARKS.glob("results/*-gaudi-modelled.md")).read_text(encoding="utf-8")
        rows = re.findall(r"^\| `sinkhorn` \| 64 × 20 \|.*$", page, re.MULTILINE)
        counted = model_table.counts_table(lavcap).split("\n")[2:]
        assert [without_error(row) for row in rows] == [without_error(row) for row in counted], (
            "run: python -m benchmarks.gaudi.model_table"
        )
        # Inputs are rounded as the processor does it, so the digits of an error are its own.
        assert all(0 < float(row.split("|")[4]) < model_table.MOST_ERROR for row in rows + counted)
        assert model_table.batches_table(lavcap) in page
        assert model_table.formulations_table(lavcap) in page
        assert model_table.fused_table(64, 20) in page
        assert "Modelled, not measured: no kernel has run on a Gaudi" in page

    def test_a_wrong_answer_has_no_count(self):
        with pytest.raises(AssertionError, match="wrong by"):
            model_table.counted("sinkhorn", 64, 20, 1, 1e-3, [Work(*[1] * 6)] * 2)
