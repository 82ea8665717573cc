"""Joint inference and input optimisation in deep equilibrium networks."""

from jdeq import adjoints, solvers
from jdeq.fixed_point import deq, fixed_point
from jdeq.solution import History, Result, Solution

__all__ = ["History", "Result", "Solution", "adjoints", "deq", "fixed_point", "solvers"]
