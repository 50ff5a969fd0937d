"""Every notebook runs from its first cell to its last, offline."""

import contextlib
import io
import json
import os
from unittest import mock

import matplotlib

from tests.common import ROOT, TempDirTestCase, tiny_gpt


def run(notebook, **environment):
    """Execute the code cells in one namespace, as a kernel does; return what they printed."""
    printed, names = io.StringIO(), {"__name__": "__main__"}
    backend = matplotlib.get_backend()
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(printed), mock.patch("time.sleep"):
        matplotlib.use("Agg")
        for i, cell in enumerate(json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{notebook}, cell {i}", "exec"), names)
    names["plt"].close("all")
    matplotlib.use(backend)
    return printed.getvalue()


class TestNotebooks(TempDirTestCase):
    def test_demo_sorts_what_it_has_never_seen(self):
        self.assertIn("held out 100.0%", run("demo.ipynb"))

    def test_generate_says_whether_the_model_is_random(self):
        printed = run("generate.ipynb", MODEL="gpt2", HF_ENDPOINT="http://127.0.0.1:9", MINGPT_HOME=str(self.folder))
        for words in ("NOT A TRAINED MODEL", "token 'Hello' = id 15496", "--- top_p 0.9"):
            self.assertIn(words, printed)
        tiny_gpt(vocab_size=50257, block_size=64).save_pretrained(self.folder)
        printed = run("generate.ipynb", MODEL=str(self.folder))
        self.assertNotIn("NOT A TRAINED MODEL", printed)
        self.assertIn("largest difference to log_probs", printed)
