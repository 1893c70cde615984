"""The notebook of docs/: it runs from the first cell to the last, and is kept without outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs/tour.ipynb"


def execute(notebook: nbformat.NotebookNode, folder: Path) -> list[str]:
    """Run a notebook in a kernel; return the joined text output of each code cell."""
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
            shown.append("\n".join(parts))
    return shown


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_the_notebook_is_linked() -> None:
    for page in ("docs/index.md", "docs/quick-start.md", "docs/reading-a-run.md"):
        assert "(tour.ipynb)" in (ROOT / page).read_text(), page


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    shown = "\n".join(execute(notebook, tmp_path))
    for words in ("Noise", "npo.alfa", "sft", "eval/score", "SFT", "True", "response", "chosen", "config.json"):
        assert words in shown, words
    assert "GPU available" not in shown, "libraries print into the notebook"
    assert not list(tmp_path.iterdir()), "the notebook wrote into the folder it was opened in"


@pytest.mark.long
def test_a_notebook_that_fails_would_be_found(tmp_path: Path) -> None:
    tree = json.loads(TOUR.read_text())
    tree["cells"] = [{**tree["cells"][1], "source": ["import dnpo\n", "dnpo.compose('npo.alfa=1')"]}]
    with pytest.raises(CellExecutionError, match=r"npo\.alfa"):
        execute(nbformat.reads(json.dumps(tree), as_version=4), tmp_path)
