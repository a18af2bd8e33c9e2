"""Every error text for a wrong argument: what was passed, what is expected in words, and the way out."""

import re

import numpy as np
import pytest
import torch

import otfuse

ENDS_X, ENDS_Y = torch.tensor([0, 2, 5]).int(), torch.tensor([0, 4, 6]).int()


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


# Each public function with arguments that are right; a test replaces one of them.
FUNCTIONS = {
    "attend": (otfuse.sinkhorn_attend, {"x": ones(2, 3, 8), "y": ones(2, 4, 8)}),
    "sinkhorn": (otfuse.sinkhorn, {"cost": ones(2, 3, 4), "epsilon": 0.1}),
    "similarity": (otfuse.similarity_matrix, {"x": ones(2, 3, 8), "y": ones(2, 4, 8)}),
    "loss": (otfuse.ot_alignment_loss, {"plan": ones(2, 3, 4) / 12, "similarity": ones(2, 3, 4)}),
    "varlen": (
        otfuse.sinkhorn_attend_varlen,
        {
            "x": ones(5, 8),
            "y": ones(6, 8),
            "cu_seqlens_x": ENDS_X,
            "cu_seqlens_y": ENDS_Y,
            "max_seqlen_x": 3,
            "max_seqlen_y": 4,
        },
    ),
}

# What each function calls its weights: argument, letters, right shape, a wrong shape.
WEIGHTS = {
    "attend": (("a", "[B, N]", [2, 3], [2, 4]), ("b", "[B, M]", [2, 4], [4])),
    "sinkhorn": (("a", "[B, N]", [2, 3], [3]), ("b", "[B, M]", [2, 4], [2, 3])),
    "loss": (("a", "[B, N]", [2, 3], [2, 3, 1]), ("b", "[B, M]", [2, 4], [4, 2])),
    "varlen": (("a", "[T_x]", [5], [2, 3]), ("b", "[T_y]", [6], [5])),
}

FLOATS = "must be float64, float32, bfloat16 or float16"
NUMBER = "must be a finite number > 0"
ITERATIONS = " or None (run all iterations)"

# argument, wrong value, error, the whole message
# fmt: off
TOKENS = [
    ("x", [[1.0]], TypeError, "x must be a torch.Tensor of shape [B, N, D]; got list"),
    ("y", None, TypeError, "y must be a torch.Tensor of shape [B, M, D]; got NoneType"),
    ("x", ones(3, 8), ValueError, "x must have shape [B, N, D]; got [3, 8]; for a single problem pass x[None]"),
    ("y", ones(4, 8), ValueError, "y must have shape [B, M, D]; got [4, 8]; for a single problem pass y[None]"),
    ("x", ones(1, 2, 3, 8), ValueError, "x must have shape [B, N, D]; got [1, 2, 3, 8]; for more than one "
     "batch dimension pass x.flatten(0, 1)"),
    ("x", ones(), ValueError, "x must have shape [B, N, D]; got []"),
    ("x", ones(2, 3, 8).long(), TypeError, f"x {FLOATS}; got int64; pass x.float()"),
    ("y", ones(2, 4, 8).bool(), TypeError, f"y {FLOATS}; got bool; pass y.float()"),
    ("y", ones(3, 4, 8), ValueError,
     "x and y must have the same batch size B; got x [2, 3, 8] and y [3, 4, 8]"),
    ("y", ones(2, 4, 7), ValueError,
     "x and y must have the same feature size D; got x [2, 3, 8] and y [2, 4, 7]"),
    ("y", ones(2, 4, 8).bfloat16(), TypeError,
     "x and y must have one dtype; got float32 and bfloat16; pass y.to(x.dtype)"),
    ("y", ones(2, 4, 8, device="meta"), ValueError,
     "x and y must be on one device; got 'cpu' and 'meta'; pass y.to(x.device)"),
]
NORMAL = "must be between 1.18e-38 and 8.51e+37 in a solve in float32"
SCALED = "and the cost (or similarity) by one number"
COST = [
    ("cost", 3, TypeError, "cost must be a torch.Tensor of shape [B, N, M]; got int"),
    ("cost", ones(3, 4), ValueError,
     "cost must have shape [B, N, M]; got [3, 4]; for a single problem pass cost[None]"),
    ("cost", ones(4), ValueError, "cost must have shape [B, N, M]; got [4]"),
    ("cost", ones(2, 3, 4).int(), TypeError, f"cost {FLOATS}; got int32; pass cost.float()"),
]
OPTIONS = [
    ("similarity", "l2", ValueError, "similarity must be one of \"cosine\", \"dot\"; got 'l2'"),
    ("weights", None, ValueError, 'weights must be one of "plan", "barycentric"; got None'),
]
SOLVER = [
    ("epsilon", 0, ValueError, f"epsilon {NUMBER}; got 0"),
    ("epsilon", -0.5, ValueError, f"epsilon {NUMBER}; got -0.5"),
    ("epsilon", float("nan"), ValueError, f"epsilon {NUMBER}; got nan"),
    ("epsilon", float("inf"), ValueError, f"epsilon {NUMBER}; got inf"),
    ("epsilon", 1e-310, ValueError, f"epsilon {NORMAL}; got 1e-310; multiply epsilon {SCALED}: the plan stays"),
    ("epsilon", 1e-38, ValueError, f"epsilon {NORMAL}; got 1e-38; multiply epsilon {SCALED}: the plan stays"),
    ("epsilon", 1e38, ValueError, f"epsilon {NORMAL}; got 1e+38; multiply epsilon {SCALED}: the plan stays"),
    ("epsilon", "0.1", TypeError, "epsilon must be a number > 0; got str"),
    ("epsilon", True, TypeError, "epsilon must be a number > 0; got bool"),
    ("epsilon", ones(), TypeError, "epsilon must be a number > 0; got Tensor; pass float(epsilon)"),
    ("epsilon", np.float32(0.1), TypeError, "epsilon must be a number > 0; got float32; pass float(epsilon)"),
    ("num_iters", 0, ValueError, "num_iters must be at least 1; got 0"),
    ("num_iters", 5.0, TypeError, "num_iters must be an int >= 1; got 5.0; pass int(num_iters)"),
    ("num_iters", np.int64(5), TypeError, "num_iters must be an int >= 1; got np.int64(5); pass int(num_iters)"),
    ("num_iters", "5", TypeError, "num_iters must be an int >= 1; got '5'"),
    ("num_iters", True, TypeError, "num_iters must be an int >= 1; got True"),
    ("tol", 0, ValueError, f"tol {NUMBER}{ITERATIONS}; got 0"),
    ("tol", "1e-3", TypeError, f"tol must be a number > 0{ITERATIONS}; got str"),
    ("grad", "none", ValueError, "grad must be one of \"unroll\", \"implicit\", \"detach\"; got 'none'"),
    ("backend", "cuda", ValueError,
     "backend must be \"auto\" or one of \"tpc\", \"triton\", \"cpu\", \"torch\"; got 'cuda'"),
]
LOSS = [
    ("plan", None, TypeError, "plan must be a torch.Tensor of shape [B, N, M]; got NoneType"),
    ("plan", ones(3, 4), ValueError,
     "plan must have shape [B, N, M]; got [3, 4]; for a single problem pass plan[None]"),
    ("similarity", ones(3, 4), ValueError,
     "similarity must have shape [B, N, M]; got [3, 4]; for a single problem pass similarity[None]"),
    ("similarity", ones(2, 4, 3), ValueError,
     "plan and similarity must have one shape [B, N, M]; got [2, 3, 4] and [2, 4, 3]"),
    ("similarity", ones(2, 3, 4).half(), TypeError,
     "plan and similarity must have one dtype; got float32 and float16; pass similarity.to(plan.dtype)"),
    ("similarity", ones(2, 3, 4, device="meta"), ValueError,
     "plan and similarity must be on one device; got 'cpu' and 'meta'; pass similarity.to(plan.device)"),
    ("similarity", ones(2, 3, 4).long(), TypeError, f"similarity {FLOATS}; got int64; pass similarity.float()"),
    ("temperature", 0.0, ValueError, f"temperature {NUMBER}; got 0.0"),
    ("temperature", 1e-310, ValueError, f"temperature {NORMAL}; got 1e-310; multiply temperature and the similarity by "
     "one number: the loss stays"),
    ("temperature", ones(), TypeError, "temperature must be a number > 0; got Tensor; pass float(temperature)"),
    ("assignment", "log", ValueError,
     "assignment must be one of \"plan\", \"log_plan\", \"barycentric\"; got 'log'"),
    ("contrast", "plan", ValueError, "contrast must be one of \"similarity\", \"assignment\"; got 'plan'"),
    ("reduction", "none", ValueError, "reduction must be one of \"mean\", \"sum\"; got 'none'"),
]
VARLEN = [
    ("x", ones(2, 3, 8), ValueError,
     "x must have shape [T_x, D]; got [2, 3, 8]; for padded tokens call sinkhorn_attend"),
    ("y", ones(8), ValueError, "y must have shape [T_y, D]; got [8]"),
    ("x", "x", TypeError, "x must be a torch.Tensor of shape [T_x, D]; got str"),
    ("y", ones(6, 7), ValueError, "x and y must have the same feature size D; got x [5, 8] and y [6, 7]"),
    ("y", ones(6, 8).double(), TypeError, "x and y must have one dtype; got float32 and float64; pass y.to(x.dtype)"),
    ("cu_seqlens_x", [0, 2, 5], TypeError, "cu_seqlens_x must be an int32 torch.Tensor of length B+1; got list"),
    ("cu_seqlens_y", ENDS_Y[None], ValueError, "cu_seqlens_y must have shape [B+1]; got [1, 3]"),
    ("cu_seqlens_x", ENDS_X[:0], ValueError, "cu_seqlens_x must have shape [B+1]; got [0]"),
    ("cu_seqlens_x", ENDS_X.long(), TypeError, "cu_seqlens_x must be int32; got int64; pass cu_seqlens_x.int()"),
    ("cu_seqlens_y", ENDS_Y.to("meta"), ValueError,
     "cu_seqlens_y must be on 'cpu' like the tokens; got 'meta'; pass cu_seqlens_y.to('cpu')"),
    ("cu_seqlens_y", ENDS_Y[:2], ValueError,
     "cu_seqlens_x and cu_seqlens_y must both have length B+1; got 3 and 2"),
    ("max_seqlen_x", ones(), TypeError, "max_seqlen_x must be an int; got Tensor; pass int(max_seqlen_x)"),
    ("max_seqlen_y", True, TypeError, "max_seqlen_y must be an int; got bool; pass int(max_seqlen_y)"),
    ("max_seqlen_y", 0, ValueError, "max_seqlen_y must be at least 1 where there are tokens; got 0"),
]
# fmt: on
TABLES = {
    "attend": TOKENS + OPTIONS + SOLVER,
    "sinkhorn": COST + SOLVER,
    "similarity": [*TOKENS, ("kind", "l2", ValueError, 'kind must be one of "cosine", "dot"; got \'l2\'')],
    "loss": LOSS,
    "varlen": VARLEN + OPTIONS + SOLVER,
}
CASES = [(function, *case) for function, table in TABLES.items() for case in table]


def call(function, **changed):
    run, arguments = FUNCTIONS[function]
    return run(**{**arguments, **changed})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_arguments_are_right_but_for_what_a_test_changes(function):
    result = call(function)
    values = result if isinstance(result, tuple) else (result,)
    assert all(bool(torch.isfinite(value).all()) for value in values if value is not None)


@pytest.mark.parametrize(
    ("function", "argument", "value", "error", "text"), CASES, ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(CASES)]
)
def test_message(function, argument, value, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$") as caught:
        call(function, **{argument: value})
    assert type(caught.value) is error


@pytest.mark.parametrize("function", WEIGHTS)
@pytest.mark.parametrize("side", [0, 1])
def test_weights(function, side):
    name, letters, shape, wrong_shape = WEIGHTS[function][side]
    wrong = [
        ([1.0], TypeError, f"must be a torch.Tensor of shape {letters} (weights or a boolean mask) or None; got list"),
        (ones(*wrong_shape), ValueError, f"must have shape {letters} = {shape}; got {wrong_shape}"),
        (
            ones(*shape).int(),
            TypeError,
            f"must hold floating-point weights or be a boolean mask; got int32; pass {name}.bool() for a mask or "
            f"{name}.float() for weights",
        ),
        (
            ones(*shape, device="meta"),
            ValueError,
            f"must be on 'cpu' like the other inputs; got 'meta'; pass {name}.to('cpu')",
        ),
    ]
    for value, error, text in wrong:
        with pytest.raises(error, match=f"^{re.escape(f'{name} {text}')}$"):
            call(function, **{name: value})
    for value in (ones(*shape), ones(*shape).bool(), ones(*shape).half(), None):  # and what the text allows
        call(function, **{name: value})


@pytest.mark.parametrize("module", [otfuse.nn.OTAttention, otfuse.nn.OTFusion])
@pytest.mark.parametrize(("argument", "value", "error", "text"), TOKENS[:4] + OPTIONS + SOLVER)
def test_modules_say_the_same(module, argument, value, error, text):
    arguments = dict(FUNCTIONS["attend"][1])
    options = {} if argument in arguments else {argument: value}
    arguments |= {argument: value} if argument in arguments else {}
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        module(**options)(**arguments)


@pytest.mark.parametrize(
    ("argument", "value", "error", "text"), [case for case in LOSS if case[0] not in ("plan", "similarity")]
)
def test_fusion_names_the_options_of_the_loss(argument, value, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        otfuse.nn.OTFusion(**{argument: value})(ones(2, 3, 8), ones(2, 4, 8))


def test_second_derivatives_of_implicit():
    """The one error that can only be raised while running."""
    cost = torch.rand(1, 3, 4, requires_grad=True)
    plan = otfuse.sinkhorn(cost, 0.5, grad="implicit", backend="cpu").plan
    (first,) = torch.autograd.grad(plan.square().sum(), cost, create_graph=True)
    text = 'grad="implicit" has first derivatives only; pass grad="unroll" to differentiate twice'
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        first.sum().backward()
