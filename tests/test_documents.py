"""README and notebooks: what they show runs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent

SMALL = {
    "quickstart": {"STEPS, INNER = 600, 40": "STEPS, INNER = 50, 10"},
    "two_dimensional": {"SIDE = 120": "SIDE = 20"},
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    for full, small in SMALL[path.stem].items():
        cells = [cell for cell in notebook.cells if full in cell.source]
        assert len(cells) == 1, f"{path.name} no longer sets {full}"
        cells[0].source = cells[0].source.replace(full, small)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    figures = sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert figures == 3


def test_committed_notebooks_have_outputs_and_no_errors():
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert outputs
        assert not [output for output in outputs if output.output_type == "error"]


def test_readme_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(blocks[0], names)
    assert capsys.readouterr().out
    assert set(names["gradient"]) == {"W", "U", "V"}


def test_readme_names_what_exists():
    import jdeq

    text = (ROOT / "README.md").read_text()
    for dotted in set(re.findall(r"`jdeq\.([a-z_]+)`", text)):
        assert hasattr(jdeq, dotted) or (ROOT / "jdeq" / dotted).exists(), dotted
    for path in re.findall(r"`((?:experiments|notebooks)/[^`]+)`", text):
        assert (ROOT / path).exists(), path
