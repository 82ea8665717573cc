"""What the package shows, and what it keeps out."""

from __future__ import annotations

import subprocess
import sys

import jdeq


def test_public_names_exist_and_are_documented():
    for module in (jdeq, jdeq.solvers, jdeq.adjoints, jdeq.joint):
        # In which order, the linter says: acronyms come before other names.
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert getattr(module, name).__doc__


def test_the_core_imports_neither_experiments_nor_optional_parts():
    """In a fresh interpreter: others of this process have imported them all."""
    code = (
        "import sys, jdeq; "
        "bad = {'experiments', 'jaxopt', 'flax', 'equinox', 'matplotlib'} & set(sys.modules); "
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
