"""jdeq and the JAX libraries it is compared with, each with its solvers and its gradients.

What the libraries ask of a user differs: jaxopt, optimistix and banax take the batch as one big
problem, with one norm and, where they accelerate, one set of coefficients. The rows "vmap" are the
other way to use them: one problem each, mapped over the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdeq
from experiments.benchmarks.problems import Problem, inner_product

PyTree = Any
Solve = Callable[..., PyTree]
"""``solve(cell, params, injected, z0, limit, tolerance, backward) -> z``."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Where a tolerance that makes an answer good enough is looked for.

    Attributes:
        high: loosest tolerance, or fewest steps.
        low: tightest tolerance, or most steps.
        halvings: bisections of the last stride.
        whole: whether the "tolerance" is a number of steps.
    """

    high: float = 1e3
    low: float = 1e-7
    halvings: int = 4
    whole: bool = False

    def strides(self) -> list[float]:
        """Tolerances from ``high`` to ``low`` by tens, or steps by doubling."""
        if self.whole:
            doublings = int(np.ceil(np.log2(self.low / self.high)))
            return [min(self.high * 2**i, self.low) for i in range(doublings + 1)]
        count = round(np.log10(self.high / self.low))
        return [self.high / 10**i for i in range(count + 1)]

    def between(self, good: float, bad: float) -> float:
        """The middle of two tolerances."""
        return float(round((good + bad) / 2)) if self.whole else float(np.sqrt(good * bad))


@dataclasses.dataclass(frozen=True, eq=False)
class JaxContestant:
    """One solver of one library.

    Attributes:
        library: its name.
        name: the solver's.
        solve: see ``Solve``.
        backwards: rules for the gradient by name: ``rule(tolerance) -> backward``.
        scale: where its tolerance is looked for; None for a library that is believed: it is given
            the goal.
        static: whether tolerances are part of the program, so that each needs its own compilation.
    """

    library: str
    name: str
    solve: Solve
    backwards: Mapping[str, Callable[[Any], Any]]
    scale: Scale | None = Scale()
    static: bool = False

    def prepare(self, problem: Problem) -> None:
        """Nothing is to be set up."""

    def has_gradient(self, problem: Problem) -> bool:
        """Whether the library differentiates it: all of these do."""
        del problem
        return True

    def scale_for(self, problem: Problem) -> Scale | None:
        """Where the tolerance of the forward solve is looked for."""
        del problem
        return self.scale

    @property
    def backward_scale(self) -> Scale | None:
        """Where the tolerance of the backward solve is looked for."""
        return self.scale

    def forward(self, problem: Problem, tolerance: float) -> Callable[[], PyTree]:
        """A compiled solve; it returns the states."""
        run = self._programs(problem, None)[0]
        return lambda: run(problem.params, problem.x, problem.z0, tolerance)

    def state(self, problem: Problem, tolerance: float) -> PyTree:
        """The answer of the compiled solve."""
        return self.forward(problem, tolerance)()

    def gradient(
        self, problem: Problem, backward: str, tolerance: float, backward_tolerance: float
    ) -> Callable[[], PyTree]:
        """A compiled solve with gradients of the loss in parameters and inputs; it returns both."""
        run = self._programs(problem, backward)[1]
        given = (problem.params, problem.x, problem.z0, problem.weights)
        return lambda: run(*given, tolerance, backward_tolerance)

    def adjoint(
        self, problem: Problem, backward: str, tolerance: float, backward_tolerance: float
    ) -> tuple[PyTree, PyTree]:
        """The state and the adjoint variable of the same solve.

        The adjoint variable is the gradient in a constant added to the cell.
        """
        run = self._programs(problem, backward)[2]
        given = (problem.params, problem.x, problem.z0, problem.weights)
        return run(*given, tolerance, backward_tolerance)

    @functools.cache  # noqa: B019 - contestants live as long as the benchmark
    def _programs(self, problem: Problem, backward: str | None) -> tuple[Callable, ...]:
        return self.programs(problem, backward)

    def programs(self, problem: Problem, backward: str | None) -> tuple[Callable, ...]:
        """Newly jitted functions: the solve, its gradient, its adjoint variable."""
        rule = (lambda _: None) if backward is None else self.backwards[backward]

        # The start and the weights are arguments: XLA would spend seconds folding such constants.
        def solve(cell, params, injected, z0, tolerance, backward_tolerance):
            adjoint = rule(backward_tolerance)
            return self.solve(cell, params, injected, z0, problem.max_steps, tolerance, adjoint)

        def forward(params: PyTree, x: PyTree, z0: PyTree, tolerance: Any) -> PyTree:
            return solve(problem.cell, params, problem.inject(params, x), z0, tolerance, 0.0)

        def loss(params, x, z0, weights, tolerance, backward_tolerance):
            injected = problem.inject(params, x)
            z = solve(problem.cell, params, injected, z0, tolerance, backward_tolerance)
            return inner_product(weights, z), z

        def shifted_loss(shift, params, x, z0, weights, tolerance, backward_tolerance):
            def cell(params, z, injected):
                return jax.tree.map(jnp.add, problem.cell(params, z, injected[0]), injected[1])

            injected = (problem.inject(params, x), shift)
            z = solve(cell, params, injected, z0, tolerance, backward_tolerance)
            return inner_product(weights, z), z

        def adjoint(params, x, z0, weights, tolerance, backward_tolerance):
            shift = jax.tree.map(jnp.zeros_like, z0)
            u, z = jax.grad(shifted_loss, has_aux=True)(
                shift, params, x, z0, weights, tolerance, backward_tolerance
            )
            return z, u

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        names = ("tolerance", "backward_tolerance") if self.static else ()
        return (
            jax.jit(forward, static_argnames=names[:1]),
            jax.jit(gradient, static_argnames=names),
            jax.jit(adjoint, static_argnames=names),
        )


def mapped(solve: Solve) -> Solve:
    """The same method on one problem at a time, mapped over the batch."""

    def solve_each(cell, params, injected, z0, limit, tolerance, backward):
        def cell_of_one(params, z, injected):
            z, injected = jax.tree.map(lambda leaf: leaf[None], (z, injected))
            return jax.tree.map(lambda leaf: leaf[0], cell(params, z, injected))

        def one(injected, z0):
            return solve(cell_of_one, params, injected, z0, limit, tolerance, backward)

        return jax.vmap(one)(injected, z0)

    return solve_each


def jdeq_contestants() -> list[JaxContestant]:
    """Solvers of jdeq; its tolerance is the goal, since it stops by that very criterion."""
    s = jdeq.solvers
    methods: dict[str, dict[str, Any]] = {
        "Anderson(5), the default": {},
        "Anderson(10)": {"solver": s.Anderson(window=10)},
        "Anderson(2)": {"solver": s.Anderson(window=2)},
        "Picard": {"solver": s.Picard()},
        "Picard, compaction": {"solver": s.Picard(), "compaction": 6},
        "Anderson(2), compaction": {"solver": s.Anderson(window=2), "compaction": 6},
        "Broyden": {"solver": s.Broyden()},
        "NewtonKrylov": {"solver": s.NewtonKrylov()},
    }
    implicit = jdeq.adjoints.Implicit
    backwards = {
        "the default": lambda _: implicit(),
        "Picard": lambda _: implicit(solver=s.Picard()),
        "Anderson(2)": lambda _: implicit(solver=s.Anderson(window=2)),
        "Anderson(5)": lambda _: implicit(solver=s.Anderson()),
    }

    def solve(options, cell, params, injected, z0, limit, tolerance, backward):
        return jdeq.deq(
            cell, params, injected, z0, rtol=tolerance, atol=0.0, max_steps=limit,
            adjoint=backward, **options,
        ).value  # fmt: skip

    return [
        JaxContestant("jdeq", name, functools.partial(solve, options), backwards, scale=None)
        for name, options in methods.items()
    ]


def jaxopt_contestants() -> list[JaxContestant]:
    """Solvers of jaxopt, with its linear solvers and, as one more, its fixed-point iteration."""
    import jaxopt
    from jaxopt import linear_solve

    def neumann(limit, tolerance, matvec, b):
        # A u = b with A = (df/dz)^T - I is the fixed point u = A u + u - b.
        step = lambda u, _: jax.tree.map(lambda a, u, b: a + u - b, matvec(u), u, b)  # noqa: E731
        solver = jaxopt.FixedPointIteration(
            step, maxiter=limit, tol=tolerance, implicit_diff=False, unroll=False
        )
        return solver.run(b, None).params

    partial = functools.partial
    backwards = {
        "GMRES": lambda tol: partial(
            linear_solve.solve_gmres, tol=tol, restart=20, maxiter=20, solve_method="incremental"
        ),
        "BiCGStab": lambda tol: partial(linear_solve.solve_bicgstab, tol=tol, maxiter=300),
        "normal CG, the default": lambda tol: partial(
            linear_solve.solve_normal_cg, tol=tol, maxiter=300
        ),
        "Picard": lambda tol: partial(neumann, 300, tol),
    }

    def solve(method, cell, params, injected, z0, limit, tolerance, backward):
        f = lambda z, params, injected: cell(params, z, injected)  # noqa: E731
        options = {"maxiter": limit, "tol": tolerance, "implicit_diff_solve": backward}
        return method(f, **options).run(z0, params, injected).params

    def broyden(f, **options):
        def g(z, params, injected):
            return jax.tree.map(jnp.subtract, f(z, params, injected), z)

        return jaxopt.Broyden(g, history_size=20, gamma=-1.0, stepsize=lambda _: 1.0, **options)

    def anderson(window, f, **options):
        return jaxopt.AndersonAcceleration(f, history_size=window, ridge=1e-6, **options)

    methods: dict[str, Solve] = {
        "Picard": partial(solve, jaxopt.FixedPointIteration),
        "Anderson(5)": partial(solve, partial(anderson, 5)),
        "Anderson(2)": partial(solve, partial(anderson, 2)),
        "Anderson(5), vmap": mapped(partial(solve, partial(anderson, 5))),
        "Broyden": partial(solve, broyden),
    }
    return [JaxContestant("jaxopt", name, run, backwards) for name, run in methods.items()]


def optimistix_contestants() -> list[JaxContestant]:
    """Solvers of optimistix that do without the Jacobian matrix, and lineax's for the gradient."""
    import lineax
    import optimistix

    two_norm = optimistix.two_norm

    def krylov(method, tolerance, **options):
        # Scaled by the norm of the whole, not entry by entry, where many entries are near zero.
        return method(rtol=0.0, atol=tolerance, norm=two_norm, max_steps=300, **options)

    backwards = {
        "GMRES": lambda tol: krylov(lineax.GMRES, tol),
        # It stops between restarts only.
        "GMRES(5)": lambda tol: krylov(lineax.GMRES, tol, restart=5),
        "BiCGStab": lambda tol: krylov(lineax.BiCGStab, tol),
    }

    def solve(method, cell, params, injected, z0, limit, tolerance, backward):
        adjoint = optimistix.ImplicitAdjoint(backward or krylov(lineax.GMRES, 1e-3))
        return optimistix.fixed_point(
            lambda z, arguments: cell(arguments[0], z, arguments[1]),
            method(tolerance),
            z0,
            (params, injected),
            max_steps=limit,
            adjoint=adjoint,
            throw=False,
        ).value

    def picard(tolerance):
        return optimistix.FixedPointIteration(rtol=0.0, atol=tolerance, norm=two_norm)

    def newton(method, forcing, tolerance):
        linear = lineax.GMRES(rtol=0.0, atol=forcing * tolerance, norm=two_norm, max_steps=60)
        return method(rtol=0.0, atol=tolerance, norm=two_norm, linear_solver=linear)

    methods = {
        "Picard": picard,
        "Newton, GMRES": functools.partial(newton, optimistix.Newton, 0.3),
        "chord, GMRES": functools.partial(newton, optimistix.Chord, 0.3),
    }
    return [
        JaxContestant("optimistix", name, functools.partial(solve, method), backwards)
        for name, method in methods.items()
    ]


def banax_contestants() -> list[JaxContestant]:
    """Solvers of banax, each also for the gradient."""
    import banax.solver
    from banax.adjoint import Implicit

    def build(name, limit, tolerance):
        options = {"rtol": tolerance, "max_steps": limit}
        return {
            "Picard": lambda: banax.solver.Picard(**options),
            "Anderson(5)": lambda: banax.solver.Anderson(depth=5, **options),
            "Anderson(2)": lambda: banax.solver.Anderson(depth=2, **options),
            "Broyden": lambda: banax.solver.Broyden(history_size=20, **options),
        }[name]()

    backwards = {
        name: functools.partial(build, name, 300) for name in ("Picard", "Anderson(5)", "Broyden")
    }

    def solve(name, cell, params, injected, z0, limit, tolerance, backward):
        adjoint = Implicit(build(name, limit, tolerance), backward or build("Picard", 1, 1e-3))
        f = lambda z, params, injected: cell(params, z, injected)  # noqa: E731
        return adjoint((f, (params, injected)), z0).value

    methods: dict[str, Solve] = {
        name: functools.partial(solve, name)
        for name in ("Picard", "Anderson(5)", "Anderson(2)", "Broyden")
    }
    methods["Anderson(5), vmap"] = mapped(methods["Anderson(5)"])
    # Its tolerances are part of the program: fewer are tried.
    scale = Scale(high=1e-4, low=1e-6, halvings=3)
    return [
        JaxContestant("banax", name, run, backwards, scale=scale, static=True)
        for name, run in methods.items()
    ]
