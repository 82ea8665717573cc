"""Fixed-point solvers: each turns an iterate and its image under the map into the next iterate."""

from jdeq.solvers.anderson import Anderson
from jdeq.solvers.base import Solver
from jdeq.solvers.bicgstab import BiCGStab
from jdeq.solvers.broyden import Broyden
from jdeq.solvers.from_jaxopt import FromJaxopt
from jdeq.solvers.gmres import GMRES
from jdeq.solvers.newton_krylov import NewtonKrylov
from jdeq.solvers.picard import Picard
from jdeq.solvers.reversible import Reversible

__all__ = [
    "GMRES",
    "Anderson",
    "BiCGStab",
    "Broyden",
    "FromJaxopt",
    "NewtonKrylov",
    "Picard",
    "Reversible",
    "Solver",
]
