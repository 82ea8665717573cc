"""Joint inference and input optimisation in deep equilibrium networks."""

from importlib.metadata import version

from jdeq import adjoints, joint, projections, regularization, solvers
from jdeq.diagnostics import Diagnosis, diagnose
from jdeq.fixed_point import deq, fixed_point
from jdeq.iterate import Fold
from jdeq.joint.augmented import AugmentedState, KKTResidual
from jdeq.joint.nested import nested_solve
from jdeq.joint.problem import InputProblem
from jdeq.joint.solve import joint_solve
from jdeq.joint.value import input_value
from jdeq.solution import History, Result, Solution

__all__ = [
    "AugmentedState",
    "Diagnosis",
    "Fold",
    "History",
    "InputProblem",
    "KKTResidual",
    "Result",
    "Solution",
    "adjoints",
    "deq",
    "diagnose",
    "fixed_point",
    "input_value",
    "joint",
    "joint_solve",
    "nested_solve",
    "projections",
    "regularization",
    "solvers",
]

__version__ = version("jdeq")
