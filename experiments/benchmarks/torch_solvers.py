"""torchdeq on the same problems: the cells in torch, with the same weights, images as NCHW."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import torchdeq
from flax import nnx
from torchdeq.solver import get_solver, register_solver

from experiments.benchmarks.jax_solvers import Scale
from experiments.benchmarks.problems import Problem
from experiments.benchmarks.timing import in_turns

PyTree = Any
Tensors = list[torch.Tensor]


def register() -> None:
    """Anderson with less regularisation: the default's keeps it from 1e-5 in single precision."""
    for m in (2, 5):
        register_solver(f"anderson{m}", functools.partial(get_solver("anderson"), m=m, lam=1e-9))


SOLVERS = {
    "Picard": "fixed_point_iter",
    "Picard, steps counted beforehand": "simple_fixed_point_iter",
    "Anderson(6), the default": "anderson",
    "Anderson(5)": "anderson5",
    "Anderson(2)": "anderson2",
    "Broyden": "broyden",
}
BACKWARDS = ("Picard", "Anderson(5)", "Anderson(2)", "Broyden")


def to_torch(leaf: Any) -> torch.Tensor:
    """A tensor of the same numbers; NHWC becomes NCHW."""
    array = np.array(leaf)
    return torch.from_numpy(
        np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array
    )


def from_torch(leaf: torch.Tensor) -> np.ndarray:
    """The way back."""
    array = leaf.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


class Twin:
    """A ``Problem`` in torch.

    Attributes:
        leaves: parameters, then inputs; what is differentiated.
        z0: the start.
        weights: cotangents.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        params, x = problem.params, problem.x
        if problem.name == "mnist":
            params = {"/".join(map(str, k)): v[...] for k, v in nnx.to_flat_state(params)}
            params = {
                k: _kernel(v) if k.endswith("kernel") else to_torch(v) for k, v in params.items()
            }
        else:
            params = {k: to_torch(v) for k, v in params.items()}
        inputs = {k: to_torch(v) for k, v in (x if isinstance(x, dict) else {"x": x}).items()}
        self._params, self._inputs = params, inputs
        self.leaves = [*params.values(), *inputs.values()]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.z0 = [to_torch(leaf) for leaf in jax.tree.leaves(problem.z0)]
        self.weights = [to_torch(leaf) for leaf in jax.tree.leaves(problem.weights)]

    def bind(self, shift: Tensors | None = None) -> Callable[..., Any]:
        """The cell with its inputs injected; ``shift`` is added to what it returns."""
        cell = {"dense": self._dense, "mnist": self._mnist, "uneven": self._uneven}[
            self.problem.name
        ]()
        if len(self.z0) == 1:
            single = cell
            cell = lambda z: single(z)  # noqa: E731
            return cell if shift is None else lambda z: single(z) + shift[0]
        if shift is None:
            return cell
        return lambda *z: [out + s for out, s in zip(cell(*z), shift, strict=True)]

    def _dense(self) -> Callable:
        injected = self._inputs["x"] @ self._params["u"] + self._params["b"]
        return lambda z: torch.tanh(torch.addmm(injected, z, self._params["w"]))

    def _uneven(self) -> Callable:
        factor, shift = self._inputs["factor"], self._inputs["shift"]
        return lambda z: torch.tanh(factor * (z @ self._params["w"]) + shift)

    def _mnist(self) -> Callable:
        weights = _effective(self._params)

        def conv(path, x, stride=1):
            kernel = weights[path]
            return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2)

        def norm(path, x, groups):
            p = self._params
            return F.group_norm(x, groups, p[f"{path}/scale"], p[f"{path}/bias"], 1e-5)

        injected = self._inputs["x"]
        for i in range(2):
            injected = conv(f"injection/convs/{i}", injected)
            injected = F.relu(norm(f"injection/norms/{i}", injected, 4))

        def block(i, z, injected):
            path = f"multiscale/blocks/{i}"
            hidden = F.relu(norm(f"{path}/hidden_norm", conv(f"{path}/widen", z), 4))
            out = conv(f"{path}/narrow", hidden)
            out = out if injected is None else out + injected
            return norm(f"{path}/norm", F.relu(norm(f"{path}/injected_norm", out, 4) + z), 4)

        def cell(fine, coarse):
            fine, coarse = block(0, fine, injected), block(1, coarse, None)
            up = norm("multiscale/up/1_to_0/norm", conv("multiscale/up/1_to_0/conv", coarse), 8)
            up = F.interpolate(up, scale_factor=2, mode="nearest")
            down = conv("multiscale/down/0_to_1/convs/0", fine, stride=2)
            down = norm("multiscale/down/0_to_1/norms/0", down, 8)
            fused = (fine + up[:, :, : fine.shape[2], : fine.shape[3]], down + coarse)
            return [
                norm(f"multiscale/norms/{i}", conv(f"multiscale/convs/{i}", F.relu(z)), 4)
                for i, z in enumerate(fused)
            ]

        return cell


def _kernel(leaf: Any) -> torch.Tensor:
    """HWIO to OIHW."""
    return torch.from_numpy(np.ascontiguousarray(np.array(leaf).transpose(3, 2, 0, 1)))


def _effective(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Kernels with the weight normalisation applied, once for a whole solve."""
    weights = {}
    for path, kernel in params.items():
        if not path.endswith("/kernel"):
            continue
        layer = path.removesuffix("/kernel")
        if (gain := params.get(f"{layer}/gain")) is not None:
            norms = kernel.square().sum((1, 2, 3)).sqrt()
            kernel = kernel * (gain / norms)[:, None, None, None]
        weights[layer] = kernel
    return weights


@functools.lru_cache(maxsize=4)
def twin(problem: Problem) -> Twin:
    """The problem in torch, made once."""
    return Twin(problem)


@dataclasses.dataclass(frozen=True)
class TorchContestant:
    """One solver of torchdeq; the interface is that of `jax_solvers.JaxContestant`."""

    name: str
    library: str = "torchdeq"
    backwards: tuple[str, ...] = BACKWARDS

    def prepare(self, problem: Problem) -> None:
        """Sets the number of threads."""
        torch.set_num_threads(best_threads(problem))

    def scale_for(self, problem: Problem) -> Scale:
        """Where its tolerance, or its number of steps, is looked for."""
        if SOLVERS[self.name] == "simple_fixed_point_iter":
            return Scale(high=4, low=problem.max_steps, halvings=9, whole=True)
        return self.backward_scale

    def has_gradient(self, problem: Problem) -> bool:
        """Whether torchdeq differentiates it: not a counted solve of a state of several leaves."""
        counted = SOLVERS[self.name] == "simple_fixed_point_iter"
        return not (counted and len(jax.tree.leaves(problem.z0)) > 1)

    @property
    def backward_scale(self) -> Scale:
        """Where the tolerance of the backward solve is looked for."""
        return Scale(high=1e-3, low=1e-7)

    def _layer(self, problem: Problem, tolerance: float, **backward: Any) -> torch.nn.Module:
        counted = SOLVERS[self.name] == "simple_fixed_point_iter"
        return torchdeq.get_deq(
            f_solver=SOLVERS[self.name],
            f_tol=tolerance,
            f_stop_mode="rel",
            f_max_iter=int(tolerance) if counted else problem.max_steps,
            **backward,
        )

    def forward(self, problem: Problem, tolerance: float) -> Callable[[], PyTree]:
        """A solve without a graph."""
        layer = self._layer(problem, tolerance).eval()
        twin_of = twin(problem)

        def run():
            with torch.no_grad():
                return layer(twin_of.bind(), _start(twin_of))[0][-1]

        return run

    def state(self, problem: Problem, tolerance: float) -> PyTree:
        """The answer, as arrays of the original's layout."""
        return _back(problem, self.forward(problem, tolerance)())

    def _differentiable(
        self, problem: Problem, backward: str, tolerance: float, backward_tolerance: float
    ) -> Callable[[Callable], Tensors]:
        layer = self._layer(
            problem,
            tolerance,
            no_stat=False,  # Without statistics a state of several leaves has no implicit gradient.
            hook_ift=True,  # One evaluation of the cell less than ift=True.
            b_solver=SOLVERS[backward],
            b_tol=backward_tolerance,
            b_stop_mode="rel",
            b_max_iter=300,
        ).train()
        return lambda cell: _as_list(layer(cell, _start(twin(problem)))[0][-1])

    def gradient(
        self, problem: Problem, backward: str, tolerance: float, backward_tolerance: float
    ) -> Callable[[], PyTree]:
        """A solve with gradients in parameters and inputs; it returns the gradients."""
        solve = self._differentiable(problem, backward, tolerance, backward_tolerance)
        twin_of = twin(problem)

        def run():
            z = solve(twin_of.bind())
            return torch.autograd.grad(_loss(twin_of, z), twin_of.leaves), z

        return run

    def adjoint(
        self, problem: Problem, backward: str, tolerance: float, backward_tolerance: float
    ) -> tuple[PyTree, PyTree]:
        """The state and the adjoint variable, the gradient in a constant added to the cell."""
        solve = self._differentiable(problem, backward, tolerance, backward_tolerance)
        twin_of = twin(problem)
        shift = [torch.zeros_like(z).requires_grad_() for z in twin_of.z0]
        z = solve(twin_of.bind(shift))
        u = torch.autograd.grad(_loss(twin_of, z), shift)
        return _back(problem, z), _back(problem, u)


def _start(twin_of: Twin) -> Any:
    return twin_of.z0[0] if len(twin_of.z0) == 1 else list(twin_of.z0)


def _as_list(z: Any) -> Tensors:
    return [z] if torch.is_tensor(z) else list(z)


def _loss(twin_of: Twin, z: Tensors) -> torch.Tensor:
    return sum((w * leaf).sum() for w, leaf in zip(twin_of.weights, z, strict=True))


def _back(problem: Problem, z: Any) -> PyTree:
    leaves = [from_torch(leaf) for leaf in _as_list(z)]
    return jax.tree.unflatten(jax.tree.structure(problem.z0), leaves)


@functools.lru_cache(maxsize=4)
def best_threads(problem: Problem) -> int:
    """One thread or all cores: whichever evaluates the cell faster."""
    twin_of = twin(problem)

    def evaluate(threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.no_grad():
            cell = twin_of.bind()
            for _ in range(10):
                cell(*twin_of.z0)

    candidates = (1, len(os.sched_getaffinity(0)))
    runs = {str(n): functools.partial(evaluate, n) for n in candidates}
    samples = in_turns(runs, repeats=10, limit=10)
    best = min(samples, key=lambda threads: min(samples[threads].wall))
    print(f"torch evaluates the cell of {problem.name} fastest with {best} threads")
    return int(best)


def contestants() -> list[TorchContestant]:
    """All solvers."""
    register()
    return [TorchContestant(name) for name in SOLVERS]
