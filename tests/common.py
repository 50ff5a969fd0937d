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
NO_POINTS = "no points for"  # what a project logs when it draws a plot that lacks a curve


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


def random_ids(*lengths):
    """A list of 1-D tensors of random token ids, for tiny_gpt."""
    return [torch.randint(11, (length,)) for length in lengths]


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

    files: {path: bytes}. headers: {path: more headers of its answer}. It understands "Range", and
    "If-Range" with an ETag.

    moods: what to do wrong in the next answers, one mood each; None and an empty list mean nothing.
    A mood is an HTTP status to answer with, a float (wait so many seconds, and then answer as one
    should), or one of

        "no range"     send the whole file, although only the rest was asked for
        "old range"    send the rest, although the file is another one by now
        "wrong range"  say that the answer begins elsewhere
        "size unknown" send a range, and not say of how many bytes it is
        "short range"  send half of what was asked for
        "corrupt"      change the last byte
        "cut"          hang up in the middle
        "stall"        fall silent in the middle, for longer than the tests' timeouts
        "slow"         pause between the pieces
        "drip"         send a byte now and then
        "endless"      never stop sending
        "chunked"      send it in chunks (Transfer-Encoding), and
        "cut chunk"    hang up in the middle of one, or
        "trailers"     never stop sending trailers, which are headers behind the body, or
        "drip chunk"   send a byte of a chunk's length now and then
        "drip headers" send a byte of the headers now and then
        "not yet"      never stop saying "100 Continue"
        "redirect"     send elsewhere: a "Location" stands in `headers`
        "endless redirect", "dripping redirect"   ... with such a body

    seen: (path, headers) of all requests. endless_bytes: how many an endless body has had.
    """

    def __init__(self, files):
        self.files = files
        self.headers = {}
        self.moods = []
        self.seen = []
        self.endless_bytes = 0
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
        if isinstance(mood, float):
            self.pause.wait(mood)
        if request.path not in self.files:
            request.send_error(404)
            return
        if mood in ("drip headers", "not yet"):
            self.send_no_headers(request, mood)
        body = self.files[request.path]
        start = self.first_byte(request, mood)
        if start >= len(body) and "redirect" not in str(mood):
            request.send_error(416)
            return
        end = (start + len(body)) // 2 if mood == "short range" else len(body)
        self.send_headers(request, start, end, mood)
        if mood in ("chunked", "cut chunk", "trailers", "drip chunk"):
            self.send_chunks(request, body[start:end], mood)
        else:
            self.send_body(request, body[start:end], mood)

    def first_byte(self, request, mood):
        """Where the answer begins."""
        version = self.headers.get(request.path, {}).get("ETag")
        is_same = request.headers.get("If-Range", version) == version
        if mood == "no range" or not (is_same or mood == "old range"):
            return 0
        asked = request.headers.get("Range", "bytes=0-")
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def send_headers(self, request, start, end, mood):
        status = 206 if start else 200
        if mood in ("chunked", "cut chunk", "trailers", "drip chunk"):
            request.protocol_version = "HTTP/1.1"  # 1.0 has no chunks
            request.close_connection = True
        request.send_response(302 if "redirect" in str(mood) else status)
        if start:
            size = "*" if mood == "size unknown" else len(self.files[request.path])
            first = start + 5 if mood == "wrong range" else start
            request.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        if request.protocol_version == "HTTP/1.1":
            length = {"Transfer-Encoding": "chunked"}
        else:
            length = {"Content-Length": str(end - start)}
        headers = {**length, **self.headers.get(request.path, {})}
        for name, value in headers.items():
            if value is not None:
                request.send_header(name, value)
        request.end_headers()

    def send_no_headers(self, request, mood):
        """What looks like the beginning of an answer, for ever."""
        request.wfile.write(b"HTTP/1.1 200 OK\r\nX: " if mood == "drip headers" else b"")
        while True:
            if mood == "not yet":
                request.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            else:
                request.wfile.write(b"x")
                self.pause.wait(0.05)

    def send_chunks(self, request, body, mood):
        for half in (body[: len(body) // 2], body[len(body) // 2 :]):
            request.wfile.write(f"{len(half):x}\r\n".encode() + half[:-1])
            if mood == "cut chunk":
                return
            request.wfile.write(half[-1:] + b"\r\n")
            while mood == "drip chunk":
                request.wfile.write(b"0")
                self.pause.wait(0.05)
        request.wfile.write(b"0\r\n")
        while mood == "trailers":
            request.wfile.write(b"X: y\r\n" * 1000)
        request.wfile.write(b"\r\n")

    def send_body(self, request, body, mood):
        if mood == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if mood in ("cut", "stall"):
            body = body[: len(body) // 2]
        while mood in ("endless", "endless redirect"):
            request.wfile.write(bytes(2**16))
            self.endless_bytes += 2**16
        for i in range(len(body) if mood in ("drip", "dripping redirect") else 0):
            request.wfile.write(body[i : i + 1])
            self.pause.wait(0.05)
        piece = 1 + len(body) // 4
        for i in range(0, len(body), piece):
            request.wfile.write(body[i : i + piece])
            if mood == "slow":
                self.pause.wait(0.1)
        if mood == "stall":
            self.pause.wait(1.5)
