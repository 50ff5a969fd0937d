"""
Executes the notebooks and keeps their outputs in them, for readers who have not run them.

    python tests/run_notebooks.py                 both; a few minutes on a CPU
    python tests/run_notebooks.py demo.ipynb

Run it when the code of a notebook, or what it shows, has changed. requirements-test.txt brings what
it needs. Warnings and logs are left out: they would tell of the machine, and of nothing else.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("demo.ipynb", "generate.ipynb")


def execute(path: Path) -> None:
    """Run all cells in a new kernel, and write the notebook back with what they gave."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}  # where the kernel runs
    client = NotebookClient(
        notebook, timeout=1800, resources=resources, coalesce_streams=True
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept(output) for output in cell.outputs if not is_log(output)]
            cell.metadata.pop("execution", None)  # the hour at which it ran
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


def is_log(output: nbformat.NotebookNode) -> bool:
    """Whether an output is what was written to stderr."""
    return output.output_type == "stream" and output.name == "stderr"


def kept(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output, of a figure only the picture."""
    if "image/png" in output.get("data", {}):
        output.data = {"image/png": output.data["image/png"]}
    return output


if __name__ == "__main__":
    for name in sys.argv[1:] or NOTEBOOKS:
        execute(ROOT / name)
