"""What several test files need: small models, temporary folders, and a server that misbehaves."""

import contextlib
import importlib.util
import io
import re
import tempfile
import threading
import unittest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from mingpt.model import GPT
from mingpt.run_folder import read_metrics
from mingpt.utils import set_seed

ROOT = Path(__file__).resolve().parents[1]


def load_script(path):
    """A script of projects/ as a module. Not by import: two projects may have modules of the same name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.log_to_console = lambda: None  # it would speak in all other tests as well
    return module


def printed(function, *args):
    """What function(*args) prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as console:
        function(*args)
    return console.getvalue()


def readme_examples(project, work_dir):
    """The Python blocks in a project's readme, with work_dir in the place of its default folder."""
    readme = (ROOT / "projects" / project / "readme.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return [block.replace(f"out/{project}", work_dir.as_posix()) for block in blocks]


def tiny_gpt(seed=0, **options):
    """A GPT of a few thousand parameters without dropout, its weights large enough for its logits to differ."""
    set_seed(seed)
    config = GPT.get_default_config()
    config.merge_from_dict({"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "block_size": 12,
                            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, **options})
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def timeless(folder):
    """The metrics of a run without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens/s")} for row in read_metrics(folder / "metrics.jsonl")]


class TempDirTestCase(unittest.TestCase):
    """Gives each test a folder of its own, self.folder."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))


class Server:
    """`with Server(files) as server`: an HTTP server on 127.0.0.1 for {path: bytes}, which can go on from a byte and misbehave.

    Each name in `moods` spoils one answer, in turn; `seen` is a list of (path, headers) of all requests.
    """

    def __init__(self, files):
        self.files, self.moods, self.seen, self.headers = files, [], [], {}
        self.pause = threading.Event()  # never set; time.sleep is what tests replace

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(ConnectionError):  # whoever has seen enough hangs up
                    outer.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        return self

    def __exit__(self, *args):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request):
        self.seen.append((request.path, dict(request.headers)))
        mood = self.moods.pop(0) if self.moods else None
        if isinstance(mood, int) or request.path not in self.files:
            return request.send_error(mood or 404)
        body = self.files[request.path]
        start = int(request.headers.get("Range", "bytes=0-")[6:-1]) if mood != "no range" else 0
        if start >= len(body):
            return request.send_error(416)
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start + 5 * (mood == 'wrong range')}-{len(body) - 1}/{len(body)}")
        if mood == "short range":  # less than was asked for, and so it says
            body = body[:(start + len(body)) // 2]
        for name, value in {"Content-Length": str(len(body) - start), **self.headers.get(request.path, {})}.items():
            request.send_header(name, value)
        request.end_headers()
        body = body[start:]
        if mood == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if mood in ("cut", "stall"):
            body = body[:len(body) // 2]
        for i in range(0, len(body), 1 + len(body) // 4):
            request.wfile.write(body[i:i + 1 + len(body) // 4])
            if mood == "slow":
                self.pause.wait(0.1)
        if mood == "stall":
            self.pause.wait(1.5)
