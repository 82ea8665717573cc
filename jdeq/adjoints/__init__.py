"""Gradients of equilibria: each attaches one differentiation rule to a forward solve."""

from jdeq.adjoints.base import Adjoint
from jdeq.adjoints.implicit import Implicit
from jdeq.adjoints.state_implicit import StateImplicit

__all__ = ["Adjoint", "Implicit", "StateImplicit"]
