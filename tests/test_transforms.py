"""torch.func over the public functions: vmap, grad, both in either order, per-sample gradients, forward mode."""

import pytest
import torch
from problems import few_roundings, here, inner, place, roundings
from torch.func import grad, hessian, jacrev, jvp, vmap

import otfuse

GRADS = ["unroll", "implicit", "detach"]
# torch's own, when it first needs its forward-mode decompositions
FIRST_FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
OPTIONS = {"epsilon": 0.3, "num_iters": 6}


def randn(*shape, seed=0):
    return here(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(inner()))


@pytest.fixture
def tokens():
    """Three batches of two items: x [3, 2, 5, 6], y [3, 2, 4, 6]."""
    return randn(3, 2, 5, 6), randn(3, 2, 4, 6, seed=1)


@pytest.fixture
def weights():
    a = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(2), dtype=inner()) + 0.1
    a[1, 0, 2] = 0
    return here(a)


def attend(x, y, backend, how="unroll", **options):
    return otfuse.sinkhorn_attend(x, y, grad=how, backend=backend, return_plan=True, **OPTIONS, **options)


def loss(out):
    """Something that depends on every differentiable output."""
    f, g = (torch.where(torch.isinf(p), 0, p) for p in (out.f, out.g))
    return out.x.pow(3).sum() + out.y.square().sum() + out.plan.square().sum() + f.sum() + g.square().sum()


def one_by_one(function, *stacks):
    """What vmap promises: the results of a loop, stacked."""
    results = [function(*values) for values in zip(*stacks)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results))
    return torch.stack(results)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=roundings(1e-10), atol=roundings(1e-12))


def fields(out):
    return tuple(out)


@pytest.mark.parametrize("how", GRADS)
def test_vmap(tokens, weights, backend, how):
    def run(x, y, a):
        return fields(attend(x, y, backend, how, a=a))

    assert_close(vmap(run)(*tokens, weights), one_by_one(run, *tokens, weights))


def test_vmap_with_a_mask_over_another_dimension(tokens, backend):
    x, y = tokens
    mask = torch.ones(2, 4, 3, dtype=torch.bool, device=place())  # [B, M, stack]
    mask[0, 1:, 1] = False

    def run(x, y, b):
        return fields(attend(x, y, backend, b=b))

    actual = vmap(run, in_dims=(1, 0, 2))(x.movedim(0, 1), y, mask)
    assert_close(actual, one_by_one(run, x, y, mask.movedim(2, 0)))


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (0, 0, None), (None, None, 0)])
def test_vmap_over_some_arguments(tokens, weights, backend, in_dims):
    args = [value if dim == 0 else value[0] for value, dim in zip((*tokens, weights), in_dims)]
    stacks = [value if dim == 0 else [value] * 3 for value, dim in zip(args, in_dims)]

    def run(x, y, a):
        return fields(attend(x, y, backend, a=a))

    assert_close(vmap(run, in_dims=in_dims)(*args), one_by_one(run, *stacks))


def test_vmap_twice(backend):
    x, y = randn(2, 3, 1, 4, 5), randn(2, 3, 1, 2, 5, seed=1)

    def run(x, y):
        return attend(x, y, backend).plan

    actual = vmap(vmap(run), in_dims=(0, 0))(x, y)
    assert_close(actual.flatten(0, 1), one_by_one(run, x.flatten(0, 1), y.flatten(0, 1)))


def test_vmap_of_every_public_function(tokens, backend):
    x, y = tokens
    ends_x, ends_y = (here(torch.tensor(ends).int()) for ends in ([0, 2, 5], [0, 3, 4]))

    def run(x, y):
        similarity = otfuse.similarity_matrix(x, y)
        plan = otfuse.sinkhorn(-similarity, 0.3, num_iters=6, backend=backend).plan
        packed = otfuse.sinkhorn_attend_varlen(x[0], y[0], ends_x, ends_y, 3, 3, backend=backend, **OPTIONS)
        fused = otfuse.nn.OTFusion(0.3, num_iters=6, backend=backend)(x, y)
        return similarity, plan, otfuse.ot_alignment_loss(plan, similarity), packed.x, fused.tokens, fused.loss

    assert_close(vmap(run)(x, y), one_by_one(run, x, y))


@pytest.mark.parametrize("how", GRADS)
def test_grad_is_that_of_autograd(tokens, weights, backend, how):
    x, y, a = (value[1].clone().requires_grad_() for value in (*tokens, weights))

    def run(x, y, a):
        return loss(attend(x, y, backend, how, a=a))

    expected = torch.autograd.grad(run(x, y, a), (x, y, a), materialize_grads=True)
    assert_close(grad(run, argnums=(0, 1, 2))(x.detach(), y.detach(), a.detach()), expected)


@pytest.mark.parametrize("how", GRADS)
def test_vmap_of_grad(tokens, weights, backend, how):
    def gradient(x, y, a):
        return grad(lambda x, y, a: loss(attend(x, y, backend, how, a=a)), argnums=(0, 1, 2))(x, y, a)

    assert_close(vmap(gradient)(*tokens, weights), one_by_one(gradient, *tokens, weights))


@pytest.mark.parametrize("how", GRADS)
def test_grad_of_vmap(tokens, weights, backend, how):
    def run(x, y, a):
        return loss(attend(x, y, backend, how, a=a))

    actual = grad(lambda *args: vmap(run)(*args).sum(), argnums=(0, 1, 2))(*tokens, weights)
    assert_close(actual, one_by_one(grad(run, argnums=(0, 1, 2)), *tokens, weights))


def test_per_sample_gradients_of_a_model(backend):
    """The usual recipe: one set of parameters, a gradient for every item."""
    x, y = randn(4, 5, 6), randn(4, 3, 6, seed=1)
    project = torch.nn.Linear(6, 6, dtype=inner(), device=place())
    fuse = otfuse.nn.OTFusion(0.3, num_iters=6, backend=backend)

    def item_loss(parameters, x, y):
        fused = fuse(torch.func.functional_call(project, parameters, (x[None],)), y[None])
        return fused.loss + fused.tokens.square().mean()

    parameters = {name: value.detach() for name, value in project.named_parameters()}
    actual = vmap(grad(item_loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(4):
        expected = torch.autograd.grad(
            item_loss(dict(project.named_parameters()), x[i], y[i]), list(project.parameters())
        )
        assert_close(tuple(value[i] for value in actual.values()), expected)


def test_jacobian(tokens, backend):
    x, y = tokens[0][0], tokens[1][0]
    jacobian = jacrev(lambda x: attend(x, y, backend).plan)(x)  # [B, N, M, B, N, D]
    x = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(x, y, backend).plan[1, 2, 3], x)
    assert_close(jacobian[1, 2, 3], expected)
    assert not jacobian[0, :, :, 1].any()  # an item does not depend on another


def test_second_derivatives(backend):
    x, y = randn(1, 3, 4), randn(1, 2, 4, seed=1)

    def run(x):
        return loss(attend(x, y, backend))

    expected = torch.autograd.functional.hessian(run, x)
    assert_close(jacrev(grad(run))(x), expected)
    if x.dtype != torch.float64:  # too coarse for differences
        exact = torch.autograd.functional.hessian(lambda x: loss(attend(x, y.double(), "torch")), x.double())
        torch.testing.assert_close(expected.double(), exact, rtol=0, atol=few_roundings() * float(exact.abs().max()))
        return
    step = 1e-5 * randn(1, 3, 4, seed=2)
    numeric = (grad(run)(x + step) - grad(run)(x - step)) / 2
    torch.testing.assert_close((expected * step).sum((3, 4, 5)), numeric, rtol=1e-5, atol=1e-12)


def along(run, x, direction):
    """Derivative by central differences."""
    return (run(x + 1e-6 * direction) - run(x - 1e-6 * direction)) / 2e-6


@FIRST_FORWARD_MODE
@pytest.mark.parametrize("how", ["unroll", "implicit"])
def test_forward_mode_on_torch(tokens, how):
    x, y, direction = tokens[0][0], tokens[1][0], randn(2, 5, 6, seed=3)

    def run(x):
        return otfuse.sinkhorn_attend(x, y, 0.3, num_iters=6 if how == "unroll" else 200, grad=how, backend="torch").x

    value, tangent = jvp(run, (x,), (direction,))
    assert_close(value, run(x))
    torch.testing.assert_close(tangent, along(run, x, direction), rtol=1e-6, atol=1e-8)


@FIRST_FORWARD_MODE
def test_forward_mode_through_a_detached_plan_on_torch(tokens):
    x, y, direction = tokens[0][0], tokens[1][0], randn(2, 5, 6, seed=3)
    _, tangent = jvp(lambda x: attend(x, y, "torch", "detach")[:3], (x,), (direction,))
    plan = attend(x, y, "torch").plan
    assert_close(tangent, (direction, plan.mT @ direction, torch.zeros_like(plan)))


@FIRST_FORWARD_MODE
def test_hessian_by_forward_over_reverse_on_torch():
    x, y = randn(1, 3, 4), randn(1, 2, 4, seed=1)

    def run(x):
        return loss(attend(x, y, "torch"))

    assert_close(hessian(run)(x), jacrev(grad(run))(x))


@FIRST_FORWARD_MODE
def test_forward_mode_on_cpu_is_refused_and_never_zero():
    cost = torch.rand(1, 3, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r'no forward-mode derivatives; pass backend="torch"$'):
        jvp(lambda cost: otfuse.sinkhorn(cost, 0.3, backend="cpu").plan, (cost,), (torch.ones_like(cost),))
    with pytest.raises(NotImplementedError, match=r'no forward-mode derivatives; pass backend="torch"$'):
        jvp(lambda x: otfuse.sinkhorn_attend(x, cost, backend="cpu").x, (cost,), (torch.ones_like(cost),))


@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_compiled_transforms(tokens, backend, order):
    def run(x, y):
        return loss(attend(x, y, backend))

    transformed = vmap(grad(run)) if order == "vmap of grad" else grad(lambda x, y: vmap(run)(x, y).sum())
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*tokens), transformed(*tokens))
