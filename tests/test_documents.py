"""README, pages and notebooks: what they show runs, and what they name exists."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import tyro
from nbclient import NotebookClient

import jdeq
import jdeq.nn
from experiments.common.cli import Task

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("experiments/*.md"))]
DOCUMENTS = [*PAGES, *NOTEBOOKS]

# What the tests put in the place of the sizes in a notebook's cell of parameters.
SMALL = {
    "adversarial": {"STEPS": 20, "ATTACK": 3, "COUNT": 40},
    "choosing": {"COUNT": 8, "LONG": 40},
    "few_shot": {"STEPS": 20, "INNER": 4},
    "inverse_problems": {"STEPS": 20, "INNER": 5, "COUNT": 10},
    "own_cell": {"STEPS": 20, "SIDE": 20},
    "quickstart": {"STEPS": 50, "INNER": 10},
    "two_dimensional": {"SIDE": 20},
    "when_it_does_not_converge": {"COUNT": 8},
}
MINUTES = 5  # that a notebook may take at full size


def read(path):
    return nbformat.read(path, as_version=4)


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def execute(notebook, timeout):
    client = NotebookClient(
        notebook, timeout=timeout, startup_timeout=timeout, kernel_name="python3"
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = read(path)
    shown = pictures(notebook)
    (place,) = (
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    )
    sizes = SMALL[path.stem]
    for name in sizes:
        assert re.search(rf"^{name} = ", notebook.cells[place].source, re.MULTILINE), name
    smaller = "\n".join(f"{name} = {value}" for name, value in sizes.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(smaller))
    execute(notebook, timeout=600)  # a cell; on a machine that is not busy all take seconds
    assert pictures(notebook) == shown > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_at_full_size_within_minutes(path):
    notebook = read(path)
    begin = time.monotonic()
    execute(notebook, timeout=60 * MINUTES)
    assert time.monotonic() - begin < 60 * MINUTES
    assert pictures(notebook) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_has_outputs_of_one_run_and_no_errors(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_installs_what_is_missing_and_nothing_else(path):
    first = next(cell for cell in read(path).cells if cell.cell_type == "code").source
    assert first.startswith("try:\n    import jdeq\nexcept ImportError:")
    assert '    %cd repository\n    %pip install -q -e ".[notebooks]"\n' in first


def test_readme_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        assert capsys.readouterr().out
    assert set(names["gradient"]) == {"W", "U", "V"}


def prose(path):
    """The text of a document, of a notebook without its code."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    return "\n\n".join(cells)


def inline_code(text):
    """What is set in single backticks, line breaks in it removed."""
    without_blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks)]


def commands(path):
    """Commands of the experiments in a document, as module and words."""
    text = prose(path)
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = "\n".join(block for language, block in fenced if language in ("", "bash"))
    blocks = blocks.replace("\\\n", " ")
    found = []
    for code in [*inline_code(text), *re.split(r"\n|&&", blocks)]:
        match = re.search(r"python3? -m (experiments[\w.]*)(.*)", code)
        if match:
            found.append((match[1], shlex.split(match[2], comments=True)))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_commands_are_understood(path):
    for module, words in commands(path):
        if words and words[-1] == "--preset":  # `--preset` with one of several names
            words = words[:-1]
        # A letter stands for a number or a folder of the reader's.
        if "--seed" in words:
            words[words.index("--seed") + 1] = "0"
        understand(module, [word for word in words if word != "--help"])


def understand(module, words):
    if module == "experiments.common.data":
        arguments = importlib.import_module(f"{module}.__main__").Arguments
        assert tyro.cli(arguments, args=words).name
    elif module.startswith("experiments.benchmarks."):
        options = benchmark_options(module)
        if options is not None and words:  # without any, the text names the script
            tyro.cli(options, args=words)
    else:
        task: Task = importlib.import_module(f"{module}.__main__").TASK
        given = tyro.cli(task.arguments, args=words)
        assert given.preset is None or given.preset in task.presets, (module, words)


@dataclasses.dataclass
class NoOptions:
    """Of a script that takes none."""


def benchmark_options(module):
    """The options of a script, None where a library that it compares with is missing."""
    try:
        return getattr(importlib.import_module(module), "Options", NoOptions)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in {"torch", "torchdeq", "optimistix", "banax"}:
            raise
        return None


def test_a_command_of_the_readme_really_runs():
    command = [sys.executable, "-m", "experiments.generative", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in ("--preset", "--run-dir", "--data-root", "--seed", "--resume"):
        assert option in shown


def test_readme_lists_every_preset_and_no_other():
    text = (ROOT / "README.md").read_text()
    for task in ("generative", "inverse", "adversarial", "meta"):
        (row,) = re.findall(rf"^\| `experiments/{task}` \|.*$", text, re.MULTILINE)
        presets = importlib.import_module(f"experiments.{task}.config").PRESETS
        if "presets" in row:
            named = re.findall(r"`([a-z0-9-]+)`", row.split("presets")[-1])
            assert sorted(named) == sorted(presets), task


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_options_exist(path):
    known = {"--help", "--signal"}  # the latter is Slurm's
    for name in ("generative", "inverse", "adversarial", "meta"):
        arguments = importlib.import_module(f"experiments.{name}.__main__").TASK.arguments
        known |= {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(arguments)}
    for code in inline_code(prose(path)):
        if not re.match(r"--[a-z]", code):
            continue
        option = re.split("[ =]", code)[0]
        assert option in known | benchmark_flags(), (path.name, code)


def benchmark_flags():
    flags = set()
    for script in ROOT.glob("experiments/benchmarks/*.py"):
        if "tyro.cli(Options)" in script.read_text():
            options = benchmark_options(f"experiments.benchmarks.{script.stem}")
            fields = () if options is None else dataclasses.fields(options)
            flags |= {f"--{field.name.replace('_', '-')}" for field in fields}
    return flags


NAMES = {
    **vars(jdeq),
    **vars(jdeq.solvers),
    **vars(jdeq.joint),
    **vars(jdeq.adjoints),  # last: of the two Reversible, `Reversible()` is the gradient
    "solvers": jdeq.solvers,
    "adjoints": jdeq.adjoints,
    "jdeq": jdeq,
}


def resolve(node):
    """What a dotted name of an expression stands for, None if that is nothing of ours."""
    if isinstance(node, ast.Name):
        return NAMES.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value)
        return None if owner is None else getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_names_and_keywords_of_the_library_exist(path):
    for code in inline_code(prose(path)):
        for dotted in re.findall(r"\bjdeq(?:\.\w+)+", code):
            resolve(ast.parse(dotted, mode="eval").body)
        try:
            tree = ast.parse(code, mode="eval")
        except SyntaxError:
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            target = resolve(call.func)
            if not callable(target):
                continue
            allowed = inspect.signature(target).parameters
            for keyword in call.keywords:
                assert keyword.arg is None or keyword.arg in allowed, (path.name, code)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_links_lead_somewhere_and_files_exist(path):
    text = prose(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), (path.name, target)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}
            assert anchor in slugs, (path.name, target)
    for code in inline_code(text):
        if re.fullmatch(r"(?:experiments|notebooks|tests|jdeq)/[\w./-]+", code):
            assert (ROOT / code).exists(), (path.name, code)
        if re.fullmatch(r"\w+\.ipynb", code):
            assert (ROOT / "notebooks" / code).exists(), (path.name, code)
