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
    """A script of projects/ as a module.

    Not by import, since two projects may have modules of the same name.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.log_to_console = lambda: None  # it would make all other tests log as well
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
    """A GPT of a few thousand parameters, without dropout.

    Its weights are larger than GPT-2's initialisation, so that its logits differ.
    """
    set_seed(seed)
    config = GPT.get_default_config()
    config.merge_from_dict(
        {
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 16,
            "vocab_size": 11,
            "block_size": 12,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "attn_pdrop": 0.0,
            **options,
        }
    )
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def timeless(folder):
    """The metrics of a run in this folder, without the ones that differ from run to run."""
    rows = read_metrics(folder / "metrics.jsonl")
    for row in rows:
        row.pop("seconds", None)
        row.pop("tokens/s", None)
    return rows


class TempDirTestCase(unittest.TestCase):
    """Gives each test a folder of its own, self.folder."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))


class Server:
    """`with Server(files) as server`: an HTTP server on 127.0.0.1 that can misbehave.

    files: {path: bytes}. headers: {path: more headers of its answer}. It understands "Range".

    moods: what to do wrong in the next answers, one mood each; None and an empty list mean nothing.
    A mood is an HTTP status to answer with, or one of

        "no range"     send the whole file, although only the rest was asked for
        "wrong range"  say that the answer begins elsewhere
        "short range"  send half of what was asked for
        "corrupt"      change the last byte
        "cut"          hang up in the middle
        "stall"        fall silent in the middle, for longer than the tests' timeouts
        "slow"         pause between the pieces
        "drip"         send a byte now and then
        "endless"      never stop sending
        "redirect"     send elsewhere: a "Location" stands in `headers`

    seen: (path, headers) of all requests.
    """

    def __init__(self, files):
        self.files = files
        self.headers = {}
        self.moods = []
        self.seen = []
        self.pause = threading.Event()  # never set: waits even where a test replaces time.sleep

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(ConnectionError):  # a client may hang up at any time
                    server.answer(self)

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
        if isinstance(mood, int):
            request.send_error(mood)
            return
        if request.path not in self.files:
            request.send_error(404)
            return
        body = self.files[request.path]
        start = 0
        if mood != "no range":
            asked = request.headers.get("Range", "bytes=0-")
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body) and mood != "redirect":
            request.send_error(416)
            return
        end = (start + len(body)) // 2 if mood == "short range" else len(body)
        self.send_headers(request, start, end, mood)
        self.send_body(request, body[start:end], mood)

    def send_headers(self, request, start, end, mood):
        status = 206 if start else 200
        request.send_response(302 if mood == "redirect" else status)
        if start:
            size = len(self.files[request.path])
            first = start + 5 if mood == "wrong range" else start
            request.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        headers = {"Content-Length": str(end - start), **self.headers.get(request.path, {})}
        for name, value in headers.items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()

    def send_body(self, request, body, mood):
        if mood == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if mood in ("cut", "stall"):
            body = body[: len(body) // 2]
        while mood == "endless":
            request.wfile.write(bytes(2**16))
        for i in range(len(body) if mood == "drip" else 0):
            request.wfile.write(body[i : i + 1])
            self.pause.wait(0.05)
        piece = 1 + len(body) // 4
        for i in range(0, len(body), piece):
            request.wfile.write(body[i : i + piece])
            if mood == "slow":
                self.pause.wait(0.1)
        if mood == "stall":
            self.pause.wait(1.5)
