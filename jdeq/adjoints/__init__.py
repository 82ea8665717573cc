"""Gradients of equilibria: each attaches one differentiation rule to a forward solve."""

from jdeq.adjoints.base import Adjoint
from jdeq.adjoints.implicit import Implicit
from jdeq.adjoints.implicit_forward import ImplicitForward
from jdeq.adjoints.kkt_implicit import KKTImplicit
from jdeq.adjoints.options import BackwardOptions
from jdeq.adjoints.phantom import JacobianFree, Phantom
from jdeq.adjoints.reversible import Reversible
from jdeq.adjoints.shine import Shine
from jdeq.adjoints.state_implicit import StateImplicit
from jdeq.adjoints.unrolled import Unrolled

__all__ = [
    "Adjoint",
    "BackwardOptions",
    "Implicit",
    "ImplicitForward",
    "JacobianFree",
    "KKTImplicit",
    "Phantom",
    "Reversible",
    "Shine",
    "StateImplicit",
    "Unrolled",
]
