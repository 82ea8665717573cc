"""Bad input: each refusal says what was given, what is expected, and what to do."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jdeq
from jdeq.adjoints import Implicit, StateImplicit
from jdeq.joint import Accelerated, Descent, InnerSolve, Polished
from jdeq.solvers import Anderson, Picard
from tests.jdeq import problems

COMMON = [
    ("max_steps", 0, ValueError, "an integer of at least 1 is expected"),
    ("max_steps", -3, ValueError, "an integer of at least 1 is expected"),
    ("max_steps", 2.0, ValueError, "an integer of at least 1 is expected"),
    ("max_steps", True, ValueError, "an integer of at least 1 is expected"),
    ("rtol", -1e-3, ValueError, "a finite number of at least 0 is expected"),
    ("rtol", float("nan"), ValueError, "a finite number of at least 0 is expected"),
    ("rtol", "tight", ValueError, "a finite number of at least 0 is expected"),
    ("rtol", None, ValueError, "a finite number of at least 0 is expected"),
    ("rtol", np.full(3, 1e-3), ValueError, "a finite number of at least 0 is expected"),
    ("atol", -1, ValueError, "a finite number of at least 0 is expected"),
    ("atol", float("inf"), ValueError, "a finite number of at least 0 is expected"),
    ("step_budget", 0, ValueError, "one integer of at least 1 is expected"),
    ("step_budget", 2.5, ValueError, "one integer of at least 1 is expected"),
    ("step_budget", np.array([1, 2, 3]), ValueError, "one integer of at least 1 is expected"),
    ("step_budget", "few", ValueError, "one integer of at least 1 is expected"),
    ("history", "yes", TypeError, "True, False or a function of the iterate is expected"),
    ("history", 1, TypeError, "True, False or a function of the iterate is expected"),
]

EQUILIBRIUM = [
    *COMMON,
    ("solver", Anderson, TypeError, "an instance such as jdeq.solvers.Anderson()"),
    ("solver", "anderson", TypeError, "an instance such as jdeq.solvers.Anderson()"),
    ("adjoint", Implicit, TypeError, "an instance such as jdeq.adjoints.Implicit()"),
    ("solver", Descent(), TypeError, "an instance such as jdeq.solvers.Anderson()"),
    ("adjoint", StateImplicit(), TypeError, "an instance such as jdeq.adjoints.Implicit()"),
    ("adjoint", Picard(), TypeError, "an instance such as jdeq.adjoints.Implicit()"),
    ("backward_probe", np.zeros(3), ValueError, "shape (3, 3) is expected for 3 problems"),
    ("backward_probe", np.zeros((3, 3), int), ValueError, "a floating-point array of shape"),
]

JOINT = [
    *COMMON,
    # Solvers have methods of the same names.
    ("method", Descent, TypeError, "an instance such as jdeq.joint.Descent()"),
    ("method", Anderson(), TypeError, "an instance such as jdeq.joint.Descent()"),
]


@pytest.mark.parametrize(("name", "value", "error", "expected"), EQUILIBRIUM)
def test_fixed_point_and_deq_refuse(name, value, error, expected):
    p = problems.linear()
    for owner, call in [
        ("deq", lambda **kw: jdeq.deq(p.cell, p.params, p.x, p.z0, **kw)),
        ("fixed_point", lambda **kw: jdeq.fixed_point(lambda _, z: z / 2, None, p.z0, **kw)),
    ]:
        with pytest.raises(error, match=rf"^{owner}: {name}.*{re.escape(expected)}") as caught:
            call(**{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value", "error", "expected"), JOINT)
def test_joint_solve_and_input_value_refuse(name, value, error, expected):
    p = problems.optimum()
    for owner in ("joint_solve", "input_value"):
        with pytest.raises(error, match=rf"^{owner}: {name}=.*{re.escape(expected)}"):
            getattr(jdeq, owner)(*p.arguments, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error", "expected"),
    [
        *COMMON,
        ("optimizer", "adam", TypeError, "an optax gradient transformation is expected"),
        ("forward", Anderson(), TypeError, "an instance such as jdeq.joint.InnerSolve()"),
        ("backward", 20, TypeError, "an instance such as jdeq.joint.InnerSolve()"),
        ("adjoint", Implicit(), TypeError, "an instance such as jdeq.adjoints.StateImplicit()"),
    ],
)
def test_nested_solve_refuses(name, value, error, expected):
    p = problems.optimum()
    with pytest.raises(error, match=rf"^nested_solve: {name}=.*{re.escape(expected)}"):
        jdeq.nested_solve(*p.arguments, **{name: value})


@pytest.mark.parametrize("call", [jdeq.fixed_point, jdeq.deq, jdeq.joint_solve, jdeq.nested_solve])
def test_unknown_options_are_refused(call):
    with pytest.raises(TypeError, match="unexpected keyword argument 'tolerance'"):
        call(*[None] * 5, tolerance=1e-3)


@pytest.mark.parametrize(
    ("make", "error", "expected"),
    [
        (lambda: Implicit(rtol=-1e-3), ValueError, "Implicit: rtol=-0.001 was given"),
        (lambda: Implicit(atol=float("nan")), ValueError, "Implicit: atol=nan was given"),
        # An array cannot key the compilation cache.
        (lambda: Implicit(rtol=jnp.array(1e-3)), ValueError, "pass a Python float"),
        (lambda: Implicit(max_steps=0), ValueError, "Implicit: max_steps=0 was given"),
        (lambda: Implicit(solver=Picard), TypeError, "Implicit: solver=.*an instance such as"),
        (lambda: StateImplicit(rtol=-1.0), ValueError, "StateImplicit: rtol=-1.0 was given"),
        (lambda: StateImplicit(max_steps=0), ValueError, "StateImplicit: max_steps=0"),
        (lambda: InnerSolve(rtol=-1.0), ValueError, "InnerSolve: rtol=-1.0 was given"),
        (lambda: InnerSolve(max_steps=0), ValueError, "InnerSolve: max_steps=0 was given"),
        (lambda: InnerSolve(solver=Anderson), TypeError, "InnerSolve: solver=.*an instance"),
        (lambda: Descent(optimizer="adam"), TypeError, "Descent: optimizer='adam' was given"),
        (lambda: Descent(step_size=0), ValueError, "Descent: step_size=0 was given"),
        (lambda: Descent(optax.sgd(0.1), 0.1), ValueError, "both optimizer and step_size=0.1"),
        (lambda: Descent(state_relaxation=0), ValueError, "Descent: state_relaxation=0"),
        (lambda: Descent(adjoint_relaxation=2), ValueError, "Descent: adjoint_relaxation=2"),
        (lambda: Accelerated(solver=Picard), TypeError, "Accelerated: solver=.*an instance"),
        (lambda: Accelerated(solver=Descent()), TypeError, "Accelerated: solver=.*an instance"),
        (lambda: Accelerated(step_size=-1.0), ValueError, "Accelerated: step_size=-1.0"),
        (lambda: Accelerated(state_relaxation=0), ValueError, "Accelerated: state_relaxation=0"),
        (lambda: Polished(descent=Accelerated()), TypeError, "Polished: descent=.*an instance"),
        (lambda: Polished(descent_share=0.0), ValueError, "Polished: descent_share=0.0"),
        (lambda: Polished(window=0), ValueError, "Polished: window=0 was given"),
        (lambda: jdeq.InputProblem(None, max), TypeError, "InputProblem: cell=None was given"),
        (lambda: jdeq.InputProblem(max, 3), TypeError, "InputProblem: objective=3 was given"),
        (lambda: jdeq.InputProblem(max, max, 3), TypeError, "InputProblem: project=3 was given"),
    ],
)
def test_options_are_refused_at_construction(make, error, expected):
    with pytest.raises(error, match=expected):
        make()


def test_batch_axes_must_agree():
    p = problems.optimum("ball")
    short = p.target[:2]
    message = r"joint_solve: target has shape \(2, 5\), but its first axis is the problem axis and"
    with pytest.raises(ValueError, match=message + " z0 holds 3 problems; give every leaf"):
        jdeq.joint_solve(p.problem, p.params, short, p.x0, p.z0, data=p.data)
    with pytest.raises(ValueError, match=r"input_value: x0 has shape \(1, 4\)"):
        jdeq.input_value(p.problem, p.params, p.target, p.x0[:1], p.z0, data=p.data)
    data = {"radius": p.data["radius"][:2]}
    with pytest.raises(ValueError, match=r"nested_solve: data\['radius'\] has shape \(2,\)"):
        jdeq.nested_solve(*p.arguments, data=data)
    with pytest.raises(
        ValueError, match=r"joint_solve: mu0 is float64\[3, 4\], but float64\[3, 5\]"
    ):
        jdeq.joint_solve(*p.arguments, data=p.data, mu0=p.x0)
    e = problems.linear()
    with pytest.raises(ValueError, match=r"deq: x has shape \(2, 4\)"):
        jdeq.deq(e.cell, e.params, e.x[:2], e.z0)
    with pytest.raises(ValueError, match=r"deq: data\[1\] has shape \(\)"):
        jdeq.deq(e.cell, e.params, e.x, e.z0, data=[e.x, 1.0])
    with pytest.raises(ValueError, match=r"fixed_point: z0\['b'\] has shape \(2,\)"):
        jdeq.fixed_point(lambda _, z: z, None, {"a": jnp.zeros((3, 1)), "b": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("z0", "error", "expected"),
    [
        (np.zeros(()), ValueError, "has no array with a problem axis"),
        ({}, ValueError, "has no array with a problem axis"),
        (np.zeros((0, 3)), ValueError, "holds no problems"),
        (np.zeros((2, 3), int), TypeError, "has dtype int64, but a floating-point dtype"),
        (np.zeros((2, 3), complex), TypeError, "has dtype complex128, but a floating-point"),
    ],
)
def test_a_start_must_be_a_batch_of_floats(z0, error, expected):
    with pytest.raises(error, match=f"fixed_point: z0 {expected}"):
        jdeq.fixed_point(lambda _, z: z, None, z0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda z: z[:, :2], r"is float64\[3, 2\], but float64\[3, 5\] is expected"),
        (lambda z: z.astype(jnp.float32), r"is float32\[3, 5\], but float64\[3, 5\] is expected"),
        (lambda z: (z, z), "has structure .* is expected"),
        (lambda z: z[:1], r"is float64\[1, 5\], but float64\[3, 5\] is expected"),
    ],
)
def test_a_cell_must_keep_structure_shape_and_dtype(change, expected):
    e, o = problems.linear(), problems.optimum()
    advice = "must return a state like the one it is given: same structure, shapes and dtypes"
    with pytest.raises(ValueError, match=f"deq: the output of cell.* {expected}; cell {advice}"):
        jdeq.deq(lambda p, z, x: change(z), e.params, e.x, e.z0)
    with pytest.raises(ValueError, match=f"fixed_point: the output of f.* {expected}; f {advice}"):
        jdeq.fixed_point(lambda p, z: change(z), None, e.z0)
    problem = jdeq.InputProblem(lambda p, z, x: change(z), problems.quadratic)
    with pytest.raises(ValueError, match=f"joint_solve: the output of cell.* {expected}"):
        jdeq.joint_solve(problem, *o.arguments[1:])


@pytest.mark.parametrize(
    ("objective", "given"),
    [
        (lambda p, z, x, t: jnp.sum(z), r"float64\[\]"),
        (lambda p, z, x, t: jnp.sum(z, 1, keepdims=True), r"float64\[3, 1\]"),
        (lambda p, z, x, t: jnp.argmax(z, 1), r"int64\[3\]"),
        (lambda p, z, x, t: (jnp.sum(z, 1), z), r"\('float64\[3\]', 'float64\[3, 5\]'\)"),
        (lambda p, z, x, t: 1.0, r"float64\[\]"),
    ],
)
def test_an_objective_must_return_one_loss_a_problem(objective, given):
    o = problems.optimum()
    problem = jdeq.InputProblem(problems.linear_cell, objective)
    expected = rf"objective returns {given}, but floating-point losses of shape \(3,\) are expected"
    for call in (jdeq.joint_solve, jdeq.input_value, jdeq.nested_solve):
        with pytest.raises(ValueError, match=f"{call.__name__}: {expected}"):
            call(problem, *o.arguments[1:])


def test_a_projection_must_return_an_input():
    o = problems.optimum()
    problem = jdeq.InputProblem(problems.linear_cell, problems.quadratic, lambda x: x[:, :1])
    with pytest.raises(
        ValueError, match=r"the output of project is float64\[3, 1\], but .*\[3, 4\]"
    ):
        jdeq.joint_solve(problem, *o.arguments[1:])


def test_a_problem_must_be_an_input_problem():
    with pytest.raises(TypeError, match=r"but a jdeq.InputProblem\(cell, objective\) is expected"):
        jdeq.joint_solve(problems.linear_cell, *problems.optimum().arguments[1:])


class CallableWithArrays:
    """As an Equinox module, it compares by value and so has no hash."""

    __hash__ = None

    def __call__(self, params, z, x):
        return z


def test_a_function_that_cannot_be_hashed_is_refused_with_advice():
    e = problems.linear()
    advice = r"cannot be hashed .* pass its arrays as params instead"
    with pytest.raises(TypeError, match=f"deq: cell is a CallableWithArrays, which {advice}"):
        jdeq.deq(CallableWithArrays(), None, e.x, e.z0)
    with pytest.raises(TypeError, match=f"fixed_point: f is a CallableWithArrays, which {advice}"):
        jdeq.fixed_point(CallableWithArrays(), None, e.z0)
    with pytest.raises(TypeError, match=f"InputProblem: objective is a Call.*, which {advice}"):
        jdeq.InputProblem(problems.linear_cell, CallableWithArrays())
    with pytest.raises(TypeError, match=f"deq: history is a Call.*, which {advice}"):
        jdeq.deq(e.cell, e.params, e.x, e.z0, history=CallableWithArrays())
    with pytest.raises(TypeError, match="deq: cell=3 was given, but a function is expected"):
        jdeq.deq(3, None, e.x, e.z0)


def test_params_must_be_arrays():
    e = problems.linear()
    for leaf in (jnp.tanh, "relu", object()):
        with pytest.raises(TypeError, match=r"deq: params\['act'\] is a .* but arrays and numbers"):
            jdeq.deq(e.cell, {"act": leaf}, e.x, e.z0)
    with pytest.raises(TypeError, match=r"joint_solve: params is a .* split a module first"):
        jdeq.joint_solve(problems.FREE, jnp.tanh, *problems.optimum().arguments[2:])


class Noisy(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, z, x):
        return self.dropout(0.1 * self.linear(z)) + x


class Normalised(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, z, x):
        return 0.5 * self.norm(z) + x


@pytest.mark.parametrize("module", [Noisy, Normalised])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_a_captured_module_that_changes_while_it_runs_is_refused(module, transform):
    """A random stream or a running statistic would differ from evaluation to evaluation."""
    model, z = module(5, nnx.Rngs(0)), jnp.ones((3, 5))
    before = jax.tree.map(jnp.array, jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))

    def cell(params, z, x):
        return model(z, x)

    advice = "draw masks and noise beforehand and pass them through data"
    with pytest.raises(ValueError, match=f"deq: cell changes the state of a module .*{advice}"):
        transform(lambda z: jdeq.deq(cell, None, z, z).value)(z)
    with pytest.raises(ValueError, match=f"fixed_point: f changes the state .*{advice}"):
        transform(lambda z: jdeq.fixed_point(lambda p, s: model(s, z), None, z).value)(z)
    problem = jdeq.InputProblem(cell, lambda p, z, x, t: jnp.sum((z - t) ** 2, 1))
    with pytest.raises(ValueError, match=f"joint_solve: cell changes the state .*{advice}"):
        transform(lambda z: jdeq.joint_solve(problem, None, z, z, z).value)(z)
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_cells_own_error_is_not_disguised():
    e = problems.linear()

    def cell(params, z, x):
        raise ZeroDivisionError("my own")

    with pytest.raises(ZeroDivisionError, match="my own"):
        jdeq.deq(cell, None, e.x, e.z0)
