"""
Every notebook runs from its first cell to its last, offline, and is kept with its outputs.

tests/run_notebooks.py makes these outputs. Cells tagged `exact` print the same on every machine:
they are compared with what is kept. Training is cut short here, and only has to raise no error.
"""

import base64
import contextlib
import io
import json
import os
import re
import socket
import struct
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import matplotlib

from mingpt.bpe import BPETokenizer
from tests.common import ROOT, TempDirTestCase, tiny_gpt
from tests.tiny_chat import write_tiny_chat

NOTEBOOKS = ("demo.ipynb", "generate.ipynb")
FIGURES = {"demo.ipynb": 2, "generate.ipynb": 2}
LARGEST_PICTURE = 40_000  # bytes
NOBODY = "http://127.0.0.1:9"  # a server that does not answer


def code_cells(notebook):
    """The cells of a notebook that have code."""
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kept_text(cell):
    """What a cell printed when its outputs were made."""
    streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join("".join(stream["text"]) for stream in streams)


def pictures(cell):
    """The PNG files that a cell drew when its outputs were made."""
    data = [output.get("data", {}) for output in cell["outputs"]]
    return [base64.b64decode(part["image/png"]) for part in data if "image/png" in part]


def shortened(source, max_iters):
    """The source of a cell, with another number of iterations."""
    return re.sub(r"max_iters = \d+", f"max_iters = {max_iters}", source)


def run(notebook, max_iters=3, **environment):
    """Execute the code cells in one namespace, as a kernel does. {cell's id: what it printed}."""
    printed = {}
    names = {"__name__": "__main__"}
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.dict(matplotlib.rcParams),  # which a notebook sets
        mock.patch("time.sleep"),  # between the tries of a download
    ):
        for cell in code_cells(notebook):
            source = shortened("".join(cell["source"]), max_iters)
            code = compile(source, f"{notebook}, cell {cell['id']}", "exec")
            with contextlib.redirect_stdout(io.StringIO()) as console:
                exec(code, names)
            printed[cell["id"]] = console.getvalue()
    names["plt"].close("all")
    matplotlib.use(backend)
    return printed


class NotebookTestCase(unittest.TestCase):
    def assert_exact(self, notebook, printed):
        """The cells tagged `exact` have printed what is kept."""
        exact = [
            cell for cell in code_cells(notebook) if "exact" in cell["metadata"].get("tags", [])
        ]
        self.assertTrue(exact)
        for cell in exact:
            with self.subTest(cell["id"]):
                self.assertEqual(printed[cell["id"]], kept_text(cell))


class TestDemo(NotebookTestCase):
    @classmethod
    def setUpClass(cls):
        cls.printed = run("demo.ipynb", max_iters=1500)  # as it stands there: it is quick enough

    def test_exact_cells_print_what_is_kept(self):
        self.assert_exact("demo.ipynb", self.printed)

    def test_it_sorts_what_it_has_never_seen(self):
        self.assertIn("held out 100.0%", "".join(self.printed.values()))


class TestGenerateOffline(NotebookTestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.environment = {"HF_ENDPOINT": NOBODY, "MINGPT_HOME": folder}
        # A tiny random model stands for the one that pip would fetch.
        model = Path(write_tiny_chat(Path(folder) / "smollm2"))
        with mock.patch("mingpt.gguf.smollm2", return_value=model):
            cls.printed = run("generate.ipynb", MODEL="gpt2", **cls.environment)

    def test_exact_cells_print_what_is_kept(self):
        self.assert_exact("generate.ipynb", self.printed)

    def test_without_gpt2_it_says_so_and_takes_smollm2(self):
        printed = "".join(self.printed.values())
        self.assertIn("NOT GPT-2, which could not be fetched, but SmolLM2", printed)
        self.assertIn("a vocabulary of 259 tokens", printed)
        self.assertIn("--- top_p 0.9", printed)

    def test_another_model_that_cannot_be_fetched_is_an_error(self):
        with self.assertRaises(ConnectionError):
            run("generate.ipynb", MODEL="user/model", **self.environment)


class TestGenerate(TempDirTestCase):
    def test_it_takes_a_model_from_a_folder(self):
        tiny_gpt(vocab_size=50257, block_size=64).save_pretrained(self.folder)
        BPETokenizer().save_pretrained(self.folder)
        printed = "".join(run("generate.ipynb", MODEL=str(self.folder)).values())
        self.assertNotIn("NOT GPT-2", printed)
        self.assertIn("token 'Hello' = id 15496", printed)
        self.assertIn("largest difference to log_probs", printed)


class TestWhatIsKept(unittest.TestCase):
    """What somebody sees who opens a notebook and does not run it."""

    def test_every_cell_has_run_in_order(self):
        for notebook in NOTEBOOKS:
            with self.subTest(notebook):
                counts = [cell["execution_count"] for cell in code_cells(notebook)]
                self.assertEqual(counts, list(range(1, len(counts) + 1)))

    def test_there_are_figures_and_they_are_small(self):
        for notebook, number in FIGURES.items():
            with self.subTest(notebook):
                found = [png for cell in code_cells(notebook) for png in pictures(cell)]
                self.assertEqual(len(found), number)
                for png in found:
                    width, height = struct.unpack(">II", png[16:24])
                    self.assertLess(len(png), LARGEST_PICTURE)
                    self.assertLess(max(width, height), 1100)

    def test_outputs_are_text_and_figures_without_errors_and_logs(self):
        for notebook in NOTEBOOKS:
            for cell in code_cells(notebook):
                for output in cell["outputs"]:
                    with self.subTest(notebook, cell=cell["id"]):
                        self.assertIn(output["output_type"], ("stream", "display_data"))
                        self.assertNotEqual(output.get("name"), "stderr")

    def test_outputs_do_not_tell_where_they_were_made(self):
        places = r"https?:|/home/|/root/|/tmp/|/Users/|site-packages|[A-Z]:\\|\d+\.\d+\.\d+\.\d+"
        for notebook in NOTEBOOKS:
            text = "".join(kept_text(cell) for cell in code_cells(notebook))
            with self.subTest(notebook):
                self.assertNotRegex(text, places)
                self.assertNotIn(socket.gethostname(), text)

    def test_generate_shows_a_real_model(self):
        text = "".join(kept_text(cell) for cell in code_cells("generate.ipynb"))
        self.assertRegex(text, r"1[23]\d\.\dM parameters")  # GPT-2 or SmolLM2

    def test_the_demo_shows_a_model_that_has_learned(self):
        text = "".join(kept_text(cell) for cell in code_cells("demo.ipynb"))
        self.assertIn("held out 100.0%", text)


if __name__ == "__main__":
    unittest.main()
