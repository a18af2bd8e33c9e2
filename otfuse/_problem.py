"""What is asked and what comes back: the checked problem and the result types.

Letters: B batch, N tokens of ``x``, M tokens of ``y``, D features.

Only shapes, dtypes, devices and Python numbers are looked at here. Tensor values never are: reading them
would stall a device and could not be traced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIMILARITIES = ("cosine", "dot")
WEIGHTS = ("plan", "barycentric")
GRADS = ("unroll", "implicit", "detach")
ASSIGNMENTS = ("plan", "log_plan", "barycentric")
CONTRASTS = ("similarity", "assignment")
REDUCTIONS = ("mean", "sum")


class SinkhornOutput(NamedTuple):
    """What :func:`otfuse.sinkhorn` returns."""

    plan: Tensor  # [B, N, M], dtype of the cost
    f: Tensor  # [B, N], in units of cost, -inf where the weight is zero; float32 at least
    g: Tensor  # [B, M], likewise
    marginal_error: Tensor  # [B], L1 error of the plan's row sums after the last iteration
    num_iters: Tensor  # [B], int32, iterations that were run


class SinkhornAttendOutput(NamedTuple):
    """What :func:`otfuse.sinkhorn_attend` returns."""

    x: Tensor  # [B, N, D], x + W y
    y: Tensor  # [B, M, D], y + W' x
    plan: Tensor | None  # [B, N, M], dtype of the tokens; None unless asked for
    f: Tensor  # [B, N], in units of similarity, -inf where the weight is zero; float32 at least
    g: Tensor  # [B, M], likewise
    marginal_error: Tensor  # [B], L1 error of the plan's row sums after the last iteration
    num_iters: Tensor  # [B], int32, iterations that were run


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class SolveOptions:
    """How a problem is solved. A backend refuses what it does not know of these (``Backend.options``)."""

    epsilon: float  # this and tol are 0-dim tensors where an op comes back to plain PyTorch for second derivatives
    num_iters: int = 50
    tol: float | None = None
    grad: str = "unroll"


@dataclass(frozen=True)
class Problem:
    """A batch of transport problems whose arguments have been checked.

    Either ``x`` and ``y`` are given (tokens, the similarity is computed) or ``cost`` is.
    """

    x: Tensor | None  # [B, N, D]
    y: Tensor | None  # [B, M, D]
    cost: Tensor | None  # [B, N, M]
    a: Tensor | None  # [B, N], weights or mask as passed
    b: Tensor | None  # [B, M]
    options: SolveOptions
    similarity: str = "dot"
    weights: str = "plan"
    return_plan: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N, M)."""
        if self.x is not None and self.y is not None:
            return self.x.shape[0], self.x.shape[1], self.y.shape[1]
        assert self.cost is not None
        return self.cost.shape[0], self.cost.shape[1], self.cost.shape[2]

    @property
    def values(self) -> Tensor:
        """The tensor that decides device and dtype."""
        values = self.cost if self.x is None else self.x
        assert values is not None
        return values

    @property
    def solve_dtype(self) -> torch.dtype:
        """float64 for float64 input, float32 for everything else."""
        return solve_dtype(self.values.dtype)

    @property
    def similarity_bound(self) -> float | None:
        """A bound on the size of every similarity known without looking at values, or None."""
        return 1.0 if self.x is not None and self.similarity == "cosine" else None

    def describe(self) -> str:
        """One line for error messages."""
        shape = "B={} N={} M={}".format(*self.shape)
        features = "" if self.x is None else f" D={self.x.shape[-1]}"
        return f"{shape}{features}, {self.values.dtype} on '{self.values.device}', epsilon={self.options.epsilon}"


@dataclass(frozen=True, kw_only=True)
class VarlenProblem(Problem):
    """Batch elements of different lengths, packed: ``x`` [T_x, D] and ``y`` [T_y, D], one after the other."""

    cu_seqlens_x: Tensor  # [B+1], int32
    cu_seqlens_y: Tensor  # [B+1]
    max_seqlen_x: int
    max_seqlen_y: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N, M) of the longest batch element."""
        return len(self.cu_seqlens_x) - 1, self.max_seqlen_x, self.max_seqlen_y

    def dense(self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Problem:
        """The same options for a dense batch: x [B, N, D], y [B, M, D], a [B, N], b [B, M]."""
        return Problem(x, y, None, a, b, self.options, self.similarity, self.weights, self.return_plan)


@dataclass(frozen=True)
class LossProblem:
    """A batch of alignment losses whose arguments have been checked."""

    plan: Tensor  # [B, N, M]
    similarity: Tensor  # [B, N, M]
    a: Tensor | None  # [B, N], weights or mask as passed
    b: Tensor | None  # [B, M]
    temperature: float
    assignment: str
    contrast: str
    mean: bool  # over the tokens of a side, not their sum

    @property
    def values(self) -> Tensor:
        """The tensor that decides device and dtype."""
        return self.plan

    @property
    def kinds(self) -> tuple[int, int, bool]:
        """As ops take them: places in ASSIGNMENTS and CONTRASTS, and ``mean``."""
        return ASSIGNMENTS.index(self.assignment), CONTRASTS.index(self.contrast), self.mean

    def describe(self) -> str:
        """One line for error messages."""
        return "B={} N={} M={}, ".format(*self.plan.shape) + f"{self.plan.dtype} on '{self.plan.device}'"


def token_problem(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    options: SolveOptions,
    similarity: str,
    weights: str,
    return_plan: bool,
) -> Problem:
    """Check the arguments of ``sinkhorn_attend``."""
    check_tensor("x", x, "[B, N, D]")
    check_tensor("y", y, "[B, M, D]")
    check_pair(x, y, ((0, "batch size B"), (2, "feature size D")))
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("weights", weights, WEIGHTS)
    check_weights("a", a, tuple(x.shape[:2]), "[B, N]", x)
    check_weights("b", b, tuple(y.shape[:2]), "[B, M]", x)
    check_options(options, x.dtype)
    return Problem(x, y, None, a, b, options, similarity, weights, return_plan)


def cost_problem(cost: Tensor, a: Tensor | None, b: Tensor | None, options: SolveOptions) -> Problem:
    """Check the arguments of ``sinkhorn``."""
    check_tensor("cost", cost, "[B, N, M]")
    B, N, M = cost.shape
    check_weights("a", a, (B, N), "[B, N]", cost)
    check_weights("b", b, (B, M), "[B, M]", cost)
    check_options(options, cost.dtype)
    return Problem(None, None, cost, a, b, options)


def varlen_problem(
    x: Tensor,
    y: Tensor,
    cu_seqlens_x: Tensor,
    cu_seqlens_y: Tensor,
    max_seqlen_x: int,
    max_seqlen_y: int,
    a: Tensor | None,
    b: Tensor | None,
    options: SolveOptions,
    similarity: str,
    weights: str,
    return_plan: bool,
) -> VarlenProblem:
    """Check the arguments of ``sinkhorn_attend_varlen``."""
    check_tensor("x", x, "[T_x, D]")
    check_tensor("y", y, "[T_y, D]")
    check_pair(x, y, ((1, "feature size D"),))
    check_packing("x", cu_seqlens_x, max_seqlen_x, x)
    check_packing("y", cu_seqlens_y, max_seqlen_y, y)
    if cu_seqlens_x.shape != cu_seqlens_y.shape:
        raise ValueError(
            f"cu_seqlens_x and cu_seqlens_y must both have length B+1; got {len(cu_seqlens_x)} and {len(cu_seqlens_y)}"
        )
    check_weights("a", a, tuple(x.shape[:1]), "[T_x]", x)
    check_weights("b", b, tuple(y.shape[:1]), "[T_y]", x)
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("weights", weights, WEIGHTS)
    check_options(options, x.dtype)
    return VarlenProblem(
        x, y, None, a, b, options, similarity, weights, return_plan,
        cu_seqlens_x=cu_seqlens_x, cu_seqlens_y=cu_seqlens_y, max_seqlen_x=max_seqlen_x, max_seqlen_y=max_seqlen_y,
    )  # fmt: skip


def loss_problem(
    plan: Tensor,
    similarity: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    temperature: float,
    assignment: str,
    contrast: str,
    reduction: str,
) -> LossProblem:
    """Check the arguments of ``ot_alignment_loss``."""
    check_tensor("plan", plan, "[B, N, M]")
    check_tensor("similarity", similarity, "[B, N, M]")
    if plan.shape != similarity.shape:
        raise ValueError(
            f"plan and similarity must have one shape [B, N, M]; got {list(plan.shape)} and {list(similarity.shape)}"
        )
    check_pair(plan, similarity, (), ("plan", "similarity"))
    way_out = "multiply temperature and the similarity by one number: the loss stays"
    check_divisor("temperature", temperature, plan.dtype, way_out)
    check_choice("assignment", assignment, ASSIGNMENTS)
    check_choice("contrast", contrast, CONTRASTS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_weights("a", a, tuple(plan.shape[:2]), "[B, N]", plan)
    check_weights("b", b, (plan.shape[0], plan.shape[2]), "[B, M]", plan)
    return LossProblem(plan, similarity, a, b, temperature, assignment, contrast, reduction == "mean")


def check_tensor(name: str, value: object, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}; got {type(value).__name__}")
    dims = shape.count(",") + 1
    if value.dim() != dims:
        missing, way_out = dims - value.dim(), ""
        if shape.startswith("[B") and missing == 1:
            way_out = f"; for a single problem pass {name}[None]"
        elif shape.startswith("[B") and missing < 0:
            way_out = f"; for more than one batch dimension pass {name}.flatten(0, {-missing})"
        elif shape.startswith("[T") and missing == -1:
            way_out = "; for padded tokens call sinkhorn_attend"
        raise ValueError(f"{name} must have shape {shape}; got {list(value.shape)}{way_out}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16; got {dtype_name(value.dtype)}; pass {name}.float()"
        )


def check_pair(x: Tensor, y: Tensor, same: tuple[tuple[int, str], ...], names: tuple[str, str] = ("x", "y")) -> None:
    first, second = names
    for dim, what in same:
        if x.shape[dim] != y.shape[dim]:
            raise ValueError(
                f"{first} and {second} must have the same {what}; got {first} {list(x.shape)} and {second} "
                f"{list(y.shape)}"
            )
    if x.dtype != y.dtype:
        raise TypeError(
            f"{first} and {second} must have one dtype; got {dtype_name(x.dtype)} and {dtype_name(y.dtype)}; "
            f"pass {second}.to({first}.dtype)"
        )
    if x.device != y.device:
        raise ValueError(
            f"{first} and {second} must be on one device; got '{x.device}' and '{y.device}'; "
            f"pass {second}.to({first}.device)"
        )


def check_weights(name: str, value: object, shape: tuple[int, ...], letters: str, like: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of shape {letters} (weights or a boolean mask) or None; "
            f"got {type(value).__name__}"
        )
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}; got {list(value.shape)}")
    if value.dtype != torch.bool and value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must hold floating-point weights or be a boolean mask; got {dtype_name(value.dtype)}; "
            f"pass {name}.bool() for a mask or {name}.float() for weights"
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on '{like.device}' like the other inputs; got '{value.device}'; "
            f"pass {name}.to('{like.device}')"
        )


def check_options(options: SolveOptions, dtype: torch.dtype) -> None:
    epsilon, num_iters, tol = options.epsilon, options.num_iters, options.tol
    check_divisor(
        "epsilon", epsilon, dtype, "multiply epsilon and the cost (or similarity) by one number: the plan stays"
    )
    if isinstance(num_iters, bool) or not isinstance(num_iters, int):
        raise TypeError(f"num_iters must be an int >= 1; got {num_iters!r}{_convert('int', 'num_iters', num_iters)}")
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1; got {num_iters}")
    if tol is not None:
        check_positive("tol", tol, " or None (run all iterations)")
    check_choice("grad", options.grad, GRADS)


def check_packing(side: str, cu_seqlens: object, max_seqlen: object, tokens: Tensor) -> None:
    name = f"cu_seqlens_{side}"
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 torch.Tensor of length B+1; got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name} must have shape [B+1]; got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {dtype_name(cu_seqlens.dtype)}; pass {name}.int()")
    if cu_seqlens.device != tokens.device:
        raise ValueError(
            f"{name} must be on '{tokens.device}' like the tokens; got '{cu_seqlens.device}'; "
            f"pass {name}.to('{tokens.device}')"
        )
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int):
        raise TypeError(
            f"max_seqlen_{side} must be an int; got {type(max_seqlen).__name__}; pass int(max_seqlen_{side})"
        )
    if max_seqlen < min(1, len(tokens)):
        raise ValueError(f"max_seqlen_{side} must be at least 1 where there are tokens; got {max_seqlen}")


def check_positive(name: str, value: object, otherwise: str = "") -> None:
    """A finite Python number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        way_out = _convert("float", name, value)
        raise TypeError(f"{name} must be a number > 0{otherwise}; got {type(value).__name__}{way_out}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0{otherwise}; got {value}")


def check_divisor(name: str, value: object, dtype: torch.dtype, way_out: str) -> None:
    """A Python number above zero, itself and its inverse normal numbers of the dtype in which ``dtype`` is solved."""
    check_positive(name, value)
    assert isinstance(value, (int, float))
    solved = solve_dtype(dtype)
    tiny = torch.finfo(solved).tiny
    if not tiny <= value <= 1 / tiny:
        raise ValueError(
            f"{name} must be between {tiny:.3g} and {1 / tiny:.3g} in a solve in {dtype_name(solved)}; got {value}; "
            f"{way_out}"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}")


def _convert(kind: str, name: str, value: object) -> str:
    """The way out for a number of another library: a tensor of one element, a numpy scalar."""
    return f"; pass {kind}({name})" if hasattr(value, f"__{kind}__") and not isinstance(value, bool) else ""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
