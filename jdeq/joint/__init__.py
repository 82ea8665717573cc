"""The joint problem: methods, the augmented state, and what a solve of it returns."""

from jdeq.joint import starts
from jdeq.joint.accelerated import Accelerated
from jdeq.joint.augmented import AugmentedState, KKTResidual
from jdeq.joint.best_of_starts import StartsAux, best_of_starts
from jdeq.joint.descent import Descent
from jdeq.joint.method import JointMethod
from jdeq.joint.nested import InnerSolve
from jdeq.joint.polished import Polished
from jdeq.joint.published import StepSwitch, published
from jdeq.joint.run import JointAux
from jdeq.joint.starts import StartStore
from jdeq.joint.trust import HypergradientError, Trust, hypergradient_error, trust

__all__ = [
    "Accelerated",
    "AugmentedState",
    "Descent",
    "HypergradientError",
    "InnerSolve",
    "JointAux",
    "JointMethod",
    "KKTResidual",
    "Polished",
    "StartStore",
    "StartsAux",
    "StepSwitch",
    "Trust",
    "best_of_starts",
    "hypergradient_error",
    "published",
    "starts",
    "trust",
]
