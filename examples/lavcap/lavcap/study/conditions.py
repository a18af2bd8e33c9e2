"""What is run: every condition of the study, in the order in which they are run, and the package's config of each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

from lavcap.config import (
    Assignment,
    AudioConfig,
    AudioOnly,
    Concatenation,
    Config,
    Contrast,
    CrossAttention,
    Gradient,
    LossConfig,
    OTAtt,
    SolverConfig,
    VisualOnly,
    Weights,
)

FUSIONS = {
    "audio": AudioOnly(),
    "visual": VisualOnly(),
    "concatenation": Concatenation(),
    "cross_attention": CrossAttention(heads=4),
    "plan": OTAtt(Weights.PLAN),
    "barycentric": OTAtt(Weights.BARYCENTRIC),
}
PUBLIC_TEMPERATURE = 1 / math.log(1 / 0.07)
LOSSES = {
    "none": LossConfig(ot_weight=0),
    "similarity": LossConfig(),  # Eq. 4's contrast, rows scaled to one: the package's default
    "assignment": LossConfig(
        assignment=Assignment.LOG_PLAN, contrast=Contrast.ASSIGNMENT, temperature=PUBLIC_TEMPERATURE
    ),  # the public code's
}
SEEDS = range(3)
CHOICE_SEEDS = (100,)
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
EPSILONS = (0.02, 0.1, 0.3, 1.0)
ROUNDS = (1, 5, 50, 200)
GRADIENTS = ("detach", "unroll", "implicit")


@dataclass(frozen=True)
class Condition:
    """One run, by what may differ between runs. Everything else is the same for all."""

    fusion: str
    loss: str = "none"
    epsilon: float = 0.1
    rounds: int = 50
    gradient: str = "unroll"
    pool: bool = True
    one_clock: bool = False  # both sides begin with the same places in time, and not with their own
    learning_rate: float = 6e-3  # chosen on validation clips: see choice()
    steps: int = 500
    seed: int = 0

    @property
    def key(self) -> str:
        """Its name in the result file: what is not the default, in words."""
        changed = [
            f"{field.name}={value}"
            for field in fields(self)[2:-1]
            if (value := getattr(self, field.name)) != field.default
        ]
        return " ".join((self.fusion, self.loss, *changed, f"seed={self.seed}"))

    def settings(self) -> dict[str, object]:
        return asdict(self)


# What the sweeps start from. With one clock seeds differ little, and so few steps leave room above and below.
USUAL = Condition("barycentric", "similarity", one_clock=True, steps=200)


def package_config(condition: Condition) -> Config:
    """The fusion, solver and loss as :mod:`lavcap.config` has them."""
    return Config(
        audio=AudioConfig(pool_frequency=condition.pool),
        fusion=FUSIONS[condition.fusion],  # type: ignore[arg-type]
        solver=SolverConfig(
            epsilon=condition.epsilon, num_iters=condition.rounds, gradient=Gradient(condition.gradient)
        ),
        loss=LOSSES[condition.loss],
    )


def arms() -> list[Condition]:
    """The rows of the table, without seeds."""
    alone = [Condition("audio"), Condition("visual")]
    both = ("concatenation", "cross_attention", "plan", "barycentric")
    return alone + [Condition(fusion, loss) for fusion in both for loss in ("none", "similarity", "assignment")]


def sweeps() -> dict[str, list[Condition]]:
    """By name, the conditions that are compared with each other, without seeds."""
    return {
        "epsilon": [replace(USUAL, epsilon=epsilon) for epsilon in EPSILONS],
        "rounds": [replace(USUAL, rounds=rounds) for rounds in ROUNDS],
        "gradient": [replace(USUAL, gradient=gradient) for gradient in GRADIENTS],
        "pooling": [replace(USUAL, pool=pool) for pool in (True, False)],
    }


def one_clock() -> list[Condition]:
    """Arms of the table, begun with one clock for both sides."""
    compared = (
        Condition("concatenation"),
        Condition("cross_attention"),
        Condition("plan"),
        Condition("barycentric"),
        Condition("barycentric", "similarity"),
    )
    return [replace(one, one_clock=True) for one in compared]


def choice() -> list[Condition]:
    """What the learning rate is chosen on: the best mean share of pairs on validation clips, over these arms."""
    compared = (
        Condition("concatenation"),
        Condition("cross_attention"),
        Condition("plan", "similarity"),
        Condition("barycentric", "similarity"),
    )
    return [
        replace(one, learning_rate=rate, seed=seed)
        for seed in CHOICE_SEEDS
        for rate in LEARNING_RATES
        for one in compared
    ]


def everything() -> list[Condition]:
    """Every run once; all conditions of a seed before the next seed, so that a study cut short can be compared."""
    swept = [condition for conditions in sweeps().values() for condition in conditions]
    ordered = [*choice(), *_seeded([*arms(), *one_clock(), *swept], SEEDS)]
    return list(dict.fromkeys(ordered))


def _seeded(conditions: list[Condition], seeds: Iterable[int]) -> list[Condition]:
    return [replace(condition, seed=seed) for seed in seeds for condition in conditions]
