"""Forward and backward of odd shapes and every dtype, checked: for compute-sanitizer to watch, or to run alone.

``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m benchmarks.gpu.sanitize``. Without the caching allocator
a tensor's end is the end of an allocation, so that a step beyond it is seen. What is right is computed on the CPU:
little but our kernels runs on the device.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import otfuse
from otfuse._backends.select import BACKENDS
from otfuse._backends.triton import loss as triton_loss
from otfuse._problem import LossProblem
from otfuse.testing import clustered_tokens

ITERATIONS = 3
Shape = tuple[Any, ...]
# B, N, M, D, dtype, gradient mode, similarity, weights, padding, epsilon: each way through the kernels once or more.
# Sizes lie beside those of the tiles; the last epsilon on chip is solved in logarithms. Sides of more than 256 are
# beyond the chip: over a cluster up to 512 columns, beyond that of few features made anew from the tokens, of more
# stored. Costs of up to 16 on both sides are small.
SHAPES = (
    (2, 9, 5, 24, torch.float32, "unroll", "cosine", "plan", False, 0.1),
    (1, 1, 1, 1, torch.float32, "unroll", "dot", "plan", False, 0.1),
    (3, 300, 20, 24, torch.bfloat16, "unroll", "cosine", "plan", True, 0.1),
    (1, 33, 290, 40, torch.float32, "unroll", "cosine", "plan", True, 0.001),
    (1, 20, 530, 24, torch.bfloat16, "unroll", "cosine", "plan", True, 0.1),
    (1, 20, 530, 70, torch.bfloat16, "unroll", "cosine", "plan", True, 0.1),
    (3, 20, 270, 70, torch.bfloat16, "implicit", "cosine", "barycentric", True, 0.1),
    (3, 17, 33, 70, torch.bfloat16, "implicit", "cosine", "barycentric", True, 0.1),
    (2, 64, 20, 129, torch.bfloat16, "unroll", "cosine", "plan", True, 0.1),
    (70, 4, 4, 8, torch.float32, "unroll", "cosine", "plan", True, 0.001),
    (33, 16, 7, 8, torch.bfloat16, "implicit", "cosine", "barycentric", False, 0.1),
    (2, 31, 16, 65, torch.float16, "detach", "dot", "barycentric", False, 8.0),
    (1, 127, 100, 33, torch.float32, "unroll", "cosine", "plan", False, 0.005),
    (1, 30, 40, 48, torch.float64, "unroll", "cosine", "barycentric", True, 0.1),
    (1, 33, 290, 40, torch.float32, "unroll", "cosine", "barycentric", False, 0.1),
)


def check(device: torch.device, shape: Shape) -> None:
    """Tokens, padded and packed, a cost, and the loss of a plan; and the gradients of each."""
    B, N, M, D, dtype, *_ = shape
    x, y = clustered_tokens(B, N, M, D, dtype=dtype)
    cost = 1 - otfuse.similarity_matrix(x, y)
    functions = [(attend, (x, y)), (solve, (cost,)), (attend_packed, (x, y))]
    if triton_loss.fits(cost):
        functions.append((align, (torch.softmax(-3 * cost, 2), cost)))
    for function, inputs in functions:
        wide = tuple(tensor.double() for tensor in inputs)
        exact, plain = run(function, shape, wide, "torch"), run(function, shape, inputs, "torch")
        ours = run(function, shape, tuple(tensor.to(device) for tensor in inputs), "triton")
        for actual, reference, right in zip(ours, plain, exact):
            # For float64 there is nothing more exact to compare with: some roundings for itself.
            rounding = torch.finfo(dtype).eps * (100 if dtype == torch.float64 else 1)
            error, allowed = off(actual, right), 2 * off(reference, right) + rounding
            assert error <= allowed, f"{function.__name__} {shape} is off by {error:.3g}, allowed {allowed:.3g}"


def attend(shape: Shape, x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, ...]:
    *_, grad, similarity, weights, padded, epsilon = shape
    return otfuse.sinkhorn_attend(
        x, y, epsilon, a=mask(x) if padded else None, similarity=similarity, num_iters=ITERATIONS, weights=weights,
        grad=grad, backend=backend,
    )[:2]  # fmt: skip


def solve(shape: Shape, cost: Tensor, backend: str) -> tuple[Tensor, ...]:
    *_, grad, _, _, padded, epsilon = shape
    a = mask(cost) if padded else None
    return otfuse.sinkhorn(cost, epsilon, a, num_iters=ITERATIONS, grad=grad, backend=backend)[:1]


def attend_packed(shape: Shape, x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Item by item half as long as the one before, and one more without tokens."""
    B, N, M, *_ = shape
    *_, grad, similarity, weights, padded, epsilon = shape
    lengths = [[max(1, side >> item) for item in range(B)] for side in (N, M)]
    x, y = (torch.cat([t[i, :n] for i, n in enumerate(lengths[side])]) for side, t in enumerate((x, y)))
    ends = [torch.tensor([0, *accumulate([*n, 0])], dtype=torch.int32, device=x.device) for n in lengths]
    keep = torch.arange(len(x), device=x.device) % 5 > 0 if padded else None
    return otfuse.sinkhorn_attend_varlen(
        x, y, *ends, N, M, epsilon, a=keep, similarity=similarity, num_iters=ITERATIONS, weights=weights, grad=grad,
        backend=backend,
    )[:2]  # fmt: skip


def align(shape: Shape, plan: Tensor, similarity: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Of the loss, what each token adds to it; another kind for each gradient mode."""
    *_, grad, _, _, padded, _ = shape
    kinds = {"unroll": ("log_plan", "similarity"), "implicit": ("barycentric", "assignment"),
             "detach": ("plan", "assignment")}  # fmt: skip
    problem = LossProblem(plan, similarity, mask(plan) if padded else None, None, 0.5, *kinds[grad], True)
    (named,) = (of for of in BACKENDS if of.name == backend)  # on a CPU too, in the interpreter
    return named.token_terms(problem)[:1]


def mask(values: Tensor) -> Tensor:
    """An item's first row is padding, the next one's first two, and so on."""
    B, N, _ = values.shape
    return torch.arange(N, device=values.device) > torch.arange(B, device=values.device)[:, None]


def run(function: Any, shape: Shape, inputs: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    """Outputs and gradients, brought to the CPU."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(shape, *leaves, backend)
    results = [out.detach().cpu() for out in outputs]
    if outputs[0].requires_grad:  # not of a solve whose plan is a constant
        generator = torch.Generator().manual_seed(1)
        sent = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
        results += [grad.cpu() for grad in torch.autograd.grad(outputs, leaves, sent)]
    return results


def off(actual: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest entry, or over a thousandth where all are small. NaN stays NaN."""
    return float((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu: the interpreter")
    parser.add_argument("--shapes", type=int, help="only the first so many (default: all, and two on a CPU)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no shape after that many")
    options = parser.parse_args()
    device, start = torch.device(options.device), time.monotonic()
    shapes = SHAPES[: options.shapes or (len(SHAPES) if device.type == "cuda" else 2)]
    done = 0
    for shape in shapes:
        if time.monotonic() - start > options.seconds:
            break
        check(device, shape)
        done += 1
    print(f"{done} of {len(SHAPES)} shapes, forward and backward: right")
    if done < len(shapes):
        sys.exit(f"the time was spent before {len(shapes) - done} of them, from {shapes[done][:5]} on")


if __name__ == "__main__":
    main()
