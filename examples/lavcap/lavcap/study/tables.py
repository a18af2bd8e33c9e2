"""Result file to Markdown tables, and into the page between its markers."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import combinations

from lavcap.study.ceilings import OBSERVERS, ceiling
from lavcap.study.conditions import (
    CHOICE_SEEDS,
    LEARNING_RATES,
    SEEDS,
    USUAL,
    Condition,
    arms,
    choice,
    one_clock,
    sweeps,
)
from lavcap.study.statistics import Estimate, estimate, paired
from lavcap.study.store import Runs

FUSION_NAMES = {
    "audio": "sound alone",
    "visual": "picture alone",
    "concatenation": "concatenation",
    "cross_attention": "cross-attention",
    "plan": "OT-Att, `plan`",
    "barycentric": "OT-Att, `barycentric`",
}
LOSS_NAMES = {
    "none": "none",
    "similarity": "similarity",
    "assignment": "assignment",
}
SWEPT = {"epsilon": "epsilon", "rounds": "rounds", "gradient": "gradient", "pooling": "pool"}
MEASURES = ("pair", "object", "sound", "order", "exact")


def table_clock(runs: Runs) -> str:
    """Arms begun with one clock, and what it brings them."""
    rows = []
    for arm in one_clock():
        pairs, apart = by_seed(runs, arm, "pair"), by_seed(runs, replace(arm, one_clock=False), "pair")
        plain = by_seed(runs, Condition("concatenation", one_clock=True), "pair")
        less = "" if arm.fusion == "concatenation" else _difference(paired(pairs, plain))
        aligned = _percent(by_seed(runs, arm, "right_frame", "alignment"))
        texts = [FUSION_NAMES[arm.fusion], LOSS_NAMES[arm.loss], str(len(pairs)), _percent(pairs), less]
        rows.append([*texts, _difference(paired(pairs, apart)), aligned])
    header = ["fusion", "OT loss", "seeds", "pair", "less concatenation", "less two clocks", "mass on the right frame"]
    return _markdown(header, rows)


def by_seed(runs: Runs, condition: Condition, measure: str, group: str = "test") -> dict[int, float]:
    """A condition's measure in every run that there is, but for those that the learning rate was chosen on."""
    keys = {seed: replace(condition, seed=seed).key for seed in SEEDS}
    return {seed: runs[key][group][measure] for seed, key in keys.items() if key in runs}


def table_arms(runs: Runs) -> str:
    """The table that stands beside the paper's II and III: per cent, mean ± half of the 95 % interval."""
    header = [
        "fusion",
        "OT loss",
        "seeds",
        *MEASURES,
        "pair, less concatenation",
        "OT loss at the end",
        "mass on the right frame",
    ]
    plain = by_seed(runs, Condition("concatenation"), "pair")
    rows = []
    for arm in arms():
        pairs = by_seed(runs, arm, "pair")
        cells = [_percent(by_seed(runs, arm, measure)) for measure in MEASURES]
        less = "" if arm == Condition("concatenation") else _difference(paired(pairs, plain))
        aligned = _percent(by_seed(runs, arm, "right_frame", "alignment"))
        name = [FUSION_NAMES[arm.fusion], LOSS_NAMES[arm.loss], str(len(pairs))]
        rows.append([*name, *cells, less, _last_loss(runs, arm), aligned])
    return _markdown(header, rows)


def table_contrasts(runs: Runs) -> str:
    """One factor of the table at a time: differences averaged over the other factor, seed by seed, in points."""
    fusions, losses = ("concatenation", "cross_attention", "plan", "barycentric"), ("none", "similarity", "assignment")
    by_loss = {loss: [Condition(fusion, loss) for fusion in fusions] for loss in losses}
    by_fusion = {fusion: [Condition(fusion, loss) for loss in losses] for fusion in fusions}
    compared = [
        (f"OT loss: {LOSS_NAMES[one]}, less {LOSS_NAMES[other]}", by_loss[one], by_loss[other])
        for one, other in (("similarity", "none"), ("assignment", "none"), ("assignment", "similarity"))
    ]
    compared += [
        (f"{FUSION_NAMES[one]}, less {FUSION_NAMES[other]}", by_fusion[one], by_fusion[other])
        for one, other in combinations(("cross_attention", "barycentric", "plan", "concatenation"), 2)
    ]
    rows = []
    for name, one, other in compared:
        pair, frame = (
            paired(mean_by_seed(runs, one, *what), mean_by_seed(runs, other, *what))
            for what in (("pair", "test"), ("right_frame", "alignment"))
        )
        rows.append([name, str(pair.seeds if pair else 0), _difference(pair), _difference(frame)])
    return _markdown(["difference", "seeds", "pair", "mass on the right frame"], rows)


def mean_by_seed(runs: Runs, conditions: list[Condition], measure: str, group: str) -> dict[int, float]:
    """Over the conditions, for each seed in which all were run."""
    values = [by_seed(runs, condition, measure, group) for condition in conditions]
    seeds = set.intersection(*(set(one) for one in values))
    return {seed: sum(one[seed] for one in values) / len(values) for seed in sorted(seeds)}


def table_sweep(runs: Runs, name: str) -> str:
    """One sweep: pair accuracy, its difference to the default by seed, and what the plan is like."""
    rows = []
    for one in sweeps()[name]:
        pairs = by_seed(runs, one, "pair")
        less = "" if one == USUAL else _difference(paired(pairs, by_seed(runs, USUAL, "pair")))
        errors = by_seed(runs, one, "marginal_error", "alignment")
        error = f"{sum(errors.values()) / len(errors):.0e}" if errors else "not run"
        aligned = _percent(by_seed(runs, one, "right_frame", "alignment"))
        rows.append([value_of(one, name), str(len(pairs)), _percent(pairs), less, aligned, error])
    return _markdown([name, "seeds", "pair", "less the default's", "mass on the right frame", "marginal error"], rows)


def value_of(condition: Condition, sweep: str) -> str:
    """What is swept, in words."""
    value = getattr(condition, SWEPT[sweep])
    return {True: "pooled", False: "unpooled"}[value] if sweep == "pooling" else str(value)


def table_choice(runs: Runs) -> str:
    """Pair accuracy on validation clips by learning rate."""
    header = ["learning rate", *(f"{FUSION_NAMES[one.fusion]}, {LOSS_NAMES[one.loss]}" for one in _compared()), "mean"]
    rows = []
    for rate in LEARNING_RATES:
        values = [runs[one.key]["validation"]["pair"] for one in choice() if one.learning_rate == rate]
        rows.append(
            [f"{rate:g}", *(f"{100 * value:.1f}" for value in values), f"{100 * sum(values) / len(values):.1f}"]
        )
    return _markdown(header, rows)


def chosen_rate(runs: Runs) -> float:
    """The learning rate of the best mean."""

    def mean(rate: float) -> float:
        return sum(runs[one.key]["validation"]["pair"] for one in choice() if one.learning_rate == rate)

    return max(LEARNING_RATES, key=mean)


def table_ceilings() -> str:
    rows = [[name, *(_fraction(value) for value in ceiling(observe))] for name, observe in OBSERVERS.items()]
    return _markdown(["what is known", "pair", "object", "sound", "exact"], rows)


def fill_page(page: str, runs: Runs) -> str:
    """The page with each block ``<!-- name -->…<!-- end -->`` made anew.

    Raises:
        ValueError: a block of the page has a name that no table has.
    """
    tables = {
        "arms": lambda: table_arms(runs),
        "contrasts": lambda: table_contrasts(runs),
        "choice": lambda: table_choice(runs),
        "ceilings": table_ceilings,
        "clock": lambda: table_clock(runs),
    }

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables and name not in SWEPT:
            raise ValueError(f"the page asks for table {name!r}; there are {', '.join((*tables, *SWEPT))}")
        text = tables[name]() if name in tables else table_sweep(runs, name)
        return f"<!-- {name} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def _last_loss(runs: Runs, arm: Condition) -> str:
    """Mean over seeds of the OT loss of the last batch."""
    found = [runs[key]["losses"][-1][2] for seed in SEEDS if (key := replace(arm, seed=seed).key) in runs]
    return f"{sum(found) / len(found):.2f}" if found and found[0] is not None else ""


def _compared() -> list[Condition]:
    return [one for one in choice() if one.learning_rate == LEARNING_RATES[0] and one.seed == CHOICE_SEEDS[0]]


def _percent(values: dict[int, float]) -> str:
    if not values:
        return "not run"
    mean, half, _ = estimate(list(values.values()))
    return f"{100 * mean:.1f}" + ("" if math.isinf(half) else f" ± {100 * half:.1f}")


def _difference(one: Estimate | None) -> str:
    """In points; bold where the interval leaves out zero."""
    if one is None:
        return "not run"
    text = f"{100 * one.mean:+.1f}" + ("" if math.isinf(one.half) else f" ± {100 * one.half:.1f}")
    return f"**{text}**" if one.excludes_zero else text


def _fraction(value: object) -> str:
    return f"{value} ({100 * float(value):.1f} %)" if str(value) != "1" else "1"  # type: ignore[arg-type]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
