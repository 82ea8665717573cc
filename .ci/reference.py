"""Build the API reference from the docstrings, with pdoc; a warning is an error.

python .ci/reference.py [FOLDER]      FOLDER is build/reference by default
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import typing
import warnings
from pathlib import Path

import jax
import pdoc

MODULES = ("jdeq", "jdeq.nn")
# Functions that have the name of their module are documented where they are exported.
HIDDEN = ("!jdeq.joint.best_of_starts", "!jdeq.joint.published", "!jdeq.joint.trust")


def main(folder: Path) -> None:
    """Write the pages to a folder."""
    for module in MODULES:
        importlib.import_module(module)
    for name in [name for name in sys.modules if name.split(".")[0] == "jdeq"]:
        for value in vars(sys.modules[name]).values():
            if inspect.isclass(value) and value.__module__ == name:
                _prepare(value)
    jax.Array.__qualname__ = "Array"  # not "jaxlib._jax.Array"
    warnings.simplefilter("error")
    pdoc.render.configure(docformat="google", include_undocumented=False, show_source=False)
    pdoc.pdoc(*MODULES, *HIDDEN, output_directory=folder)


def _prepare(cls: type) -> None:
    """Resolve the annotations of what named tuples and dataclasses generate.

    pdoc looks for their names in the module that generated the method, where they are not.
    """
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        made = cls.__new__
        for field in cls._fields:
            getattr(cls, field).__doc__ = ""  # not "Alias for field number 0"
        made.__doc__ = ""
    elif dataclasses.is_dataclass(cls):
        made = cls.__init__
    else:
        return
    made.__annotations__.update(typing.get_type_hints(cls))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/reference"))
