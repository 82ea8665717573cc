"""The multiscale cell: parameter counts, shapes, what flows where, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdeq
from jdeq.nn import MultiscaleCell, variational_masks


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


# Of the published few-shot cell's 2,490,688 parameters, 154,368 modulate nothing: the linear maps
# of the context for the second and third normalisation of each block.
@pytest.mark.parametrize(
    ("widths", "context", "expected"),
    [
        ((24, 24), 0, 111_792),
        ((32, 64, 128, 256), 0, 8_716_192),
        ((64, 128), 400, 2_490_688 - 154_368),
    ],
)
def test_published_parameter_counts(widths, context, expected):
    cell = nnx.eval_shape(lambda: MultiscaleCell(widths, context=context, rngs=nnx.Rngs(0)))
    assert count(cell) == expected


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (12, 6)])
@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 8, 16)])
def test_shapes_of_any_branches_and_sizes(widths, size):
    cell = MultiscaleCell(widths, expansion=2, rngs=nnx.Rngs(0))
    shapes = cell.shapes(2, size)
    z = tuple(jnp.zeros(s) for s in shapes)
    out = jax.jit(lambda z, x: cell(z, [x] + [None] * (len(widths) - 1)))(z, jnp.ones(shapes[0]))
    assert tuple(a.shape for a in out) == shapes
    assert all(bool(jnp.isfinite(a).all()) for a in out)


@pytest.fixture
def cell():
    return MultiscaleCell(
        (8, 8), expansion=2, state_scale=0.5, rngs=nnx.Rngs(0), param_dtype=jnp.float64
    )


def state(cell, seed, batch=3):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=s) for s in cell.shapes(batch, (6, 6)))


def test_the_norm_of_a_state_is_set_by_the_last_normalisation(cell):
    out = cell(state(cell, 0), state(cell, 1))
    for branch in out:
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(branch**2)), 0.5, rtol=1e-2)


def test_problems_are_independent(cell):
    z, injections = state(cell, 0), state(cell, 1)
    together = cell(z, injections)
    alone = cell(tuple(a[1:2] for a in z), tuple(a[1:2] for a in injections))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1:2], b, rtol=1e-10, atol=1e-12)


def test_both_branches_reach_both(cell):
    z, injections = state(cell, 0), state(cell, 1)
    base = cell(z, injections)
    for branch in range(2):
        moved = list(z)
        moved[branch] = moved[branch] + 0.1 * state(cell, 2)[branch]
        for before, after in zip(base, cell(tuple(moved), injections), strict=True):
            assert float(jnp.max(jnp.abs(after - before))) > 1e-4


def test_dropped_channels_leave_the_injection(cell):
    z, injections = state(cell, 0), state(cell, 1)
    ones = variational_masks(jax.random.key(0), rate=0.0, batch=3, widths=(8, 8))
    for a, b in zip(cell(z, injections, ones), cell(z, injections), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    none = tuple(jnp.zeros_like(m) for m in ones)
    silent = nnx.clone(cell)
    for block in silent.blocks:
        block.narrow.gain[...] = 0 * block.narrow.gain[...]
    for a, b in zip(cell(z, injections, none), silent(z, injections), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_context_modulates(cell):
    modulated = MultiscaleCell((8, 8), expansion=2, context=6, rngs=nnx.Rngs(0))
    z, injections = state(modulated, 0), state(modulated, 1)
    rng = np.random.default_rng(3)
    first = modulated(z, injections, context=rng.normal(size=(3, 6)))
    second = modulated(z, injections, context=rng.normal(size=(3, 6)))
    assert float(jnp.max(jnp.abs(first[1] - second[1]))) > 1e-4
    with pytest.raises(ValueError, match="got none"):
        modulated(z, injections)
    with pytest.raises(ValueError, match=r"one of shape \(3, 6\)"):
        cell(z, injections, context=np.ones((3, 6)))


def test_an_untrained_cell_with_injections_everywhere_contracts():
    cell = MultiscaleCell((8, 16), state_scale=0.5, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    graph, params = nnx.split(cell)
    z0 = tuple(jnp.zeros(s) for s in cell.shapes(2, (8, 8)))
    solution = jdeq.deq(
        lambda params, z, x: nnx.merge(graph, params)(z, x),
        params,
        state_like(z0),
        z0,
        solver=jdeq.solvers.Picard(),
        rtol=1e-8,
        max_steps=200,
    )
    assert (np.asarray(solution.result) == int(jdeq.Result.converged)).all()


def state_like(z):
    rng = np.random.default_rng(5)
    return tuple(rng.normal(size=a.shape) for a in z)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ((10, 8), {}, "4 groups for 10 channels"),
        ((12, 8), {}, "8 groups for 12 channels"),
        ((), {}, "no widths"),
        ((8, 8), {"context": 3}, "context of 3 features for 2 branches"),
    ],
)
def test_impossible_sizes_are_refused(widths, options, message):
    with pytest.raises(ValueError, match=message):
        MultiscaleCell(widths, rngs=nnx.Rngs(0), **options)


def test_one_branch_needs_no_fusion_groups():
    assert count(MultiscaleCell((12,), rngs=nnx.Rngs(0))) > 0


def test_the_state_keeps_its_dtype_whatever_is_added_to_it():
    # Regression: a float32 context or injection made a bfloat16 state float32.
    cell = MultiscaleCell((8, 8), expansion=2, context=6, rngs=nnx.Rngs(0))
    state = tuple(jnp.zeros((2, *s), jnp.bfloat16) for s in ((4, 4, 8), (2, 2, 8)))
    given = [jnp.zeros(z.shape, jnp.float32) for z in state]
    masks = [jnp.ones((2, 8), jnp.float32)] * 2
    context = jnp.zeros((2, 6), jnp.float32)
    out = jax.eval_shape(lambda: cell(state, given, masks, context))
    assert [branch.dtype for branch in out] == [jnp.bfloat16] * 2
