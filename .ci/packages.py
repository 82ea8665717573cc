"""Build a wheel and an sdist, and use each in an empty environment, outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SOLVE = """
import jax.numpy as jnp
import jdeq, jdeq.nn

problem = jdeq.InputProblem(
    lambda params, z, x: jnp.tanh(params * z + x),
    lambda params, z, x, target: jnp.sum((z - target) ** 2, axis=1),
)
zeros, target = jnp.zeros((3, 2)), jnp.full((3, 2), 0.5)
solution = jdeq.joint_solve(problem, 0.5, target, zeros, zeros)
assert solution.converged.all(), solution.result
assert jnp.allclose(solution.value.z, target, atol=1e-2), solution.value.z
try:
    import experiments
except ImportError:
    print(jdeq.__version__, jdeq.__file__)
else:
    raise SystemExit("the package brings the experiments along")
"""


def main() -> None:
    """Exit with a traceback if anything is missing, or there that should not be."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
        (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
        _check_contents(wheel, sdist)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        for package, options in ((wheel, ()), (sdist, ("--no-deps", "--force-reinstall"))):
            _run(python, "-m", "pip", "install", "-q", *options, package)
            _run(python, "-c", SOLVE, cwd=folder)


def _check_contents(wheel: Path, sdist: Path) -> None:
    """A wheel holds the package alone, an sdist every file of the repository."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    extra = {name for name in names if name != "jdeq" and not name.endswith(".dist-info")}
    assert not extra, f"{wheel.name} holds {sorted(extra)} besides jdeq"
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    missing = sorted(set(listed) - packed)
    assert not missing, f"{sdist.name} lacks {missing}"


def _run(*command: str | Path, cwd: Path = ROOT) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(word) for word in command], cwd=cwd, env=clean, check=True)


if __name__ == "__main__":
    main()
