"""Every notebook runs from its first cell to its last, offline."""

import contextlib
import io
import json
import os
from unittest import mock

import matplotlib

from tests.common import ROOT, TempDirTestCase, tiny_gpt


def code_cells(notebook):
    """The code of each cell that has some, compiled under a name that tracebacks can show."""
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            yield compile("".join(cell["source"]), f"{notebook}, cell {i}", "exec")


def run(notebook, **environment):
    """Execute the code cells in one namespace, as a kernel does. Returns what they printed."""
    printed = io.StringIO()
    names = {"__name__": "__main__"}
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch("time.sleep"),  # between the tries of a download
        contextlib.redirect_stdout(printed),
    ):
        for code in code_cells(notebook):
            exec(code, names)
    names["plt"].close("all")
    matplotlib.use(backend)
    return printed.getvalue()


class TestNotebooks(TempDirTestCase):
    def test_demo_sorts_what_it_has_never_seen(self):
        self.assertIn("held out 100.0%", run("demo.ipynb"))

    def test_generate_says_that_its_model_is_random_where_it_cannot_fetch_one(self):
        nobody = "http://127.0.0.1:9"
        home = str(self.folder)
        printed = run("generate.ipynb", MODEL="gpt2", HF_ENDPOINT=nobody, MINGPT_HOME=home)
        self.assertIn("NOT A TRAINED MODEL", printed)
        self.assertIn("token 'Hello' = id 15496", printed)
        self.assertIn("--- top_p 0.9", printed)

    def test_generate_takes_a_model_from_a_folder(self):
        tiny_gpt(vocab_size=50257, block_size=64).save_pretrained(self.folder)
        printed = run("generate.ipynb", MODEL=str(self.folder))
        self.assertNotIn("NOT A TRAINED MODEL", printed)
        self.assertIn("largest difference to log_probs", printed)
