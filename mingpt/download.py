"""
Files from the network: fetched once, checked, kept, and resumed where a download broke off.

`download` is the loop: it tries until the file is there. `fetch` is one try, and reads as the
story of an HTTP request: what to ask for, what the answer promises, writing it, checking it.
What arrives is collected in a file named `....part`, which takes its real name only when it is
complete and correct. So a file that exists is a file to trust, and a program that was killed
loses nothing.

Servers differ in what they answer, and not all mean well. Each function below says which case
it takes care of, and tests/test_download.py has a server that misbehaves in each of these ways.
"""

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from mingpt.config import CfgNode, check_numbers

if TYPE_CHECKING:
    # At run time the functions that need requests import it themselves: importing it takes as long
    # as all the rest of this library, and few programs download anything.
    import requests

logger = logging.getLogger("mingpt")

REDIRECTS = 10  # as many as a browser follows, at most
SLOWEST = 1024  # bytes per second; a server that sends less for a whole `timeout` is given up
LARGEST_UNANNOUNCED = 10 * 2**30  # bytes; where nobody says how large a file is, it ends here


def home() -> Path:
    """The folder of downloads: $MINGPT_HOME, by default ~/.cache/mingpt."""
    chosen = os.environ.get("MINGPT_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mingpt"


class NotFound(ValueError):
    """The server has no such file (404)."""


class TryAgain(Exception):
    """A try has failed in a way that another one may mend. The message is for people."""


def download(
    url: str,
    path: str | Path,
    sha256: str | None = None,
    size: int | None = None,
    headers: dict[str, str] | None = None,
    tries: int = 5,
    timeout: float = 30.0,
    otherwise: str = "",
) -> Path:
    """Download url to the file `path`, unless that exists. Returns the path.

    An earlier download that broke off is continued. The file takes its name only when its size
    (in bytes) and SHA-256 are right: the given ones, or else those that the server announces.
    headers are added to the request. timeout is how many seconds the server may stay silent, or
    send less than 1 kB a second. If several processes want the same file, one downloads it and
    the others wait. otherwise: a sentence for the error, on what a person can do instead.

    Network errors and overloaded servers are worth another try, after 1, 2, 4, ... seconds. Raises
    ConnectionError when all tries failed; a later call continues with what has arrived. Raises
    ValueError at once where the server refuses (NotFound for a 404) or sends the wrong file.
    """
    path = Path(path)
    check_arguments(tries, timeout, size, sha256)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path):
        for failures in range(1, tries + 1):
            if path.exists():
                break  # another process has downloaded it while this one waited
            try:
                fetch(url, path, sha256, size, headers, timeout)
            except TryAgain as error:
                if failures == tries:
                    message = f"{url} failed {tries} times, the last time because {error}"
                    raise ConnectionError(f"{message}. {otherwise}".strip()) from error
                wait = 2 ** (failures - 1)
                logger.info(
                    "retrying in %d s (%d of %d): %s", wait, failures + 1, tries, error
                )
                time.sleep(wait)
    return path


def check_arguments(tries: int, timeout: float, size: int | None, sha256: str | None) -> None:
    """ValueError for arguments of `download` that are out of range."""
    check_numbers(CfgNode(tries=tries), "tries", low=1, whole=True)
    check_numbers(CfgNode(timeout=timeout), "timeout", low=0.001)
    check_numbers(CfgNode(size=size), "size", whole=True, optional=True)
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256={sha256!r} must be 64 hexadecimal digits in lower case")


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Within, no other process downloads to this path. A process that is killed lets go of it."""
    from filelock import FileLock, Timeout

    # The lock's own file stands in a folder of locks, for it cannot be removed safely.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: waiting for another process, which downloads it", path.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fetch(
    url: str,
    path: Path,
    sha256: str | None,
    size: int | None,
    headers: dict[str, str] | None,
    timeout: float,
) -> None:
    """One try of `download`: complete the part, check it, and give it its name.

    Raises TryAgain where another try may help, and ValueError where it will not.
    """
    part = Part(path)
    done = part.length()
    with request(url, part.headers(headers), timeout) as answer:
        if answer.status_code not in (200, 206, 416):
            refuse(url, answer)
        if part.is_of_another_file(answer, done):
            part.remove()
            raise TryAgain("what has arrived so far is of another version of the file")
        refuse_compression(url, answer)

        # 206 sends the rest, as asked. 200 sends the whole file even where we asked for the rest:
        # many simple servers ignore the Range header, Python's own http.server among them. And it
        # is the answer to If-Range where the file has changed.
        start = done if answer.status_code == 206 else 0
        if start == 0:
            part.remember_version(answer)
        if size is None:
            size = announced_size(answer)
        if sha256 is None:
            sha256 = announced_sha256(answer)
        length = write_body(answer, part.path, start, size, timeout)

    if size is not None and length < size:
        raise TryAgain(f"the connection ended after {length} of {size} bytes")
    problem = find_problem(part.path, length, size, sha256)
    if problem:
        part.remove()
        # Bytes of an earlier try may be to blame, and then a fresh start can help. But a server
        # that sent all of a wrong file would only send it again.
        raise (TryAgain if start else ValueError)(f"{url} sends {problem}")
    part.complete()


# --------------------------------------------------------------------------------------------------
# what has arrived so far


class Part:
    """The file `<path>.part`, and which version of the file on the server it is the beginning of.

    The version is kept in `<path>.version`: the ETag or the date of change that the server gave.
    """

    def __init__(self, path: Path):
        self.final_path = path
        self.path = path.with_name(f"{path.name}.part")
        self.version_path = path.with_name(f"{path.name}.version")

    def length(self) -> int:
        """How many bytes have arrived."""
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> str:
        """What the server called the version that has begun to arrive; "" if it said nothing."""
        if not self.version_path.exists():
            return ""
        return self.version_path.read_text(encoding="utf-8")

    def headers(self, headers: dict[str, str] | None) -> dict[str, str]:
        """The headers that ask for what is missing."""
        # "identity" asks for the file as it is. Compressed on the way, as web servers like to do
        # with text, its bytes could be neither counted nor continued from the middle.
        ask_for = {"Accept-Encoding": "identity", **(headers or {})}
        if self.length():
            ask_for["Range"] = f"bytes={self.length()}-"
            # The rest only if it is still the same file, else all of the new one.
            if self.version():
                ask_for["If-Range"] = self.version()
        return ask_for

    def is_of_another_file(self, answer: "requests.Response", done: int) -> bool:
        """Whether our first `done` bytes are no beginning of what the server has, or sends.

        416 says that the file ends before byte `done`: our part is of another file or version,
        or was already complete when a program was killed. And a 206 must begin where we asked it
        to, and be of our version; a cache between us and the server may send another range.
        """
        if answer.status_code == 416:
            return True
        if answer.status_code != 206:
            return False
        begins_elsewhere = not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        version = version_of(answer)
        has_changed = bool(version and self.version() and version != self.version())
        return begins_elsewhere or has_changed

    def remember_version(self, answer: "requests.Response") -> None:
        """Keep what the server calls the version that begins to arrive."""
        self.version_path.unlink(missing_ok=True)
        if version_of(answer):
            self.version_path.write_text(version_of(answer), encoding="utf-8")

    def remove(self) -> None:
        """Forget what has arrived."""
        self.path.unlink(missing_ok=True)
        self.version_path.unlink(missing_ok=True)

    def complete(self) -> None:
        """Give the file its name."""
        self.path.replace(self.final_path)
        self.version_path.unlink(missing_ok=True)


def version_of(answer: "requests.Response") -> str:
    """A text that changes when the file does: a strong ETag, or else the date of its change."""
    etag = answer.headers.get("ETag", "")
    # A weak ETag, W/"...", stands for files of the same meaning, which may differ in their bytes.
    return etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")


# --------------------------------------------------------------------------------------------------
# the request and its answer


@contextlib.contextmanager
def request(url: str, headers: dict[str, str], timeout: float) -> Iterator["requests.Response"]:
    """The answer to a GET, whose body is still to be read. TryAgain if there is none.

    Redirects are followed here, and not by requests, which would read their bodies, however
    large. The answers on the way are kept as answer.history.
    """
    import requests

    history: list[requests.Response] = []
    try:
        with requests.Session() as session:
            while True:
                answer = session.get(
                    url, headers=headers, timeout=timeout, stream=True, allow_redirects=False
                )
                if not answer.is_redirect:
                    break
                answer.close()
                history.append(answer)
                if len(history) > REDIRECTS:
                    raise ValueError(f"{url} redirects more than {REDIRECTS} times")
                target = urljoin(url, answer.headers["Location"])
                # What is secret is for the server that we asked, and not for where it sends us.
                if urlsplit(target).netloc != urlsplit(url).netloc:
                    headers = {k: v for k, v in headers.items() if k != "Authorization"}
                url = target
            answer.history = history
            with answer:
                yield answer
    except requests.RequestException as error:
        raise TryAgain(in_words(error)) from error


def in_words(error: "requests.RequestException") -> str:
    """What has gone wrong with a connection, for people."""
    import requests

    if isinstance(error, (requests.ReadTimeout, requests.ConnectTimeout)):
        return "the server does not answer"
    if isinstance(error, requests.ConnectionError):
        return "the server cannot be reached, or there is no network"
    return f"the request failed ({type(error).__name__}: {error})"


def refuse(url: str, answer: "requests.Response") -> NoReturn:
    """Raise for an answer that brings no file: ValueError if it will be the same the next time."""
    status = answer.status_code
    # The server is in trouble, has timed out (408), or gets too many requests (429).
    if status >= 500 or status in (408, 429):
        raise TryAgain(f"the server answers {answer.reason} ({status})")
    kind = NotFound if status == 404 else ValueError
    raise kind(f"{url} answers {answer.reason} ({status}): is the name right, and may you read it?")


def refuse_compression(url: str, answer: "requests.Response") -> None:
    """ValueError for a compressed body, which could be cut, or unpack to any size."""
    encoding = answer.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ValueError(f"{url} sends the file compressed ({encoding}), which we did not ask for")


def announced_size(answer: "requests.Response") -> int | None:
    """The size of the whole file in bytes, as far as the answer tells it; else None."""
    # A 206 says "Content-Range: bytes 100-199/1000", or "/*" where it does not know the whole; its
    # Content-Length is only that of the rest. A 200 says "Content-Length: 1000", or nothing where
    # it makes up the file as it sends it.
    length = answer.headers.get("Content-Length", "")
    total = answer.headers.get("Content-Range", length).rpartition("/")[2]
    # The Hugging Face hub gives the size of a large file in a header of its own.
    linked_size = hub_header(answer, "X-Linked-Size")
    if linked_size.isdecimal():
        return int(linked_size)
    return int(total) if total.isdecimal() else None


def announced_sha256(answer: "requests.Response") -> str | None:
    """The SHA-256 that the Hugging Face hub gives for its large files; else None."""
    # An ETag may be anything that changes with the file, and only this form can be checked.
    etag = hub_header(answer, "X-Linked-Etag").strip('"')
    return etag if re.fullmatch("[0-9a-f]{64}", etag) else None


def hub_header(answer: "requests.Response", name: str) -> str:
    """A header of the server that we asked, "" if it has none.

    The Hugging Face hub describes a file in its own answer, which redirects us to another server.
    What that one says of itself does not count: a mirror must not choose its own checksum.
    """
    asked = answer.history[0] if answer.history else answer
    return asked.headers.get(name, "")


# --------------------------------------------------------------------------------------------------
# the body


def write_body(
    answer: "requests.Response", part: Path, start: int, size: int | None, timeout: float
) -> int:
    """Write the answer's body into `part`, from byte `start` on. Returns where it ended.

    Never more than `size` bytes are written, or LARGEST_UNANNOUNCED where it is not known. Raises
    TryAgain for a server that sends hardly anything, and ValueError for one that sends too much.
    """
    largest = LARGEST_UNANNOUNCED if size is None else size
    end = start
    watch = Watch(timeout)
    with (
        part.open("r+b" if part.exists() else "wb") as f,
        tqdm(
            desc=part.stem,
            total=size,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None,  # no bar where the output is not a terminal
        ) as bar,
    ):
        f.seek(start)
        f.truncate()  # what lies behind is of an older version
        try:
            for chunk in chunks(answer):
                end += len(chunk)
                if end > largest:
                    break
                f.write(chunk)
                bar.update(len(chunk))
                watch.saw(len(chunk))
        finally:
            f.flush()
            os.fsync(f.fileno())
    if end > largest:
        part.unlink()
        raise ValueError(f"{answer.url} sends more than {largest} bytes, which is all there may be")
    return end


def chunks(answer: "requests.Response") -> Iterator[bytes]:
    """The body, piece by piece, each as soon as it has arrived. TryAgain if the connection breaks.

    requests' own iterator waits until a piece is full, for ever if the server sends one byte now
    and then.
    """
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    try:
        while chunk := answer.raw.read1(2**16):
            yield chunk
    except ReadTimeoutError as error:
        raise TryAgain("the server has fallen silent") from error
    except HTTPError as error:
        raise TryAgain("the connection ended too early") from error


class Watch:
    """Gives up a server that sends less than SLOWEST bytes a second for `timeout` seconds."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.since = time.monotonic()
        self.bytes = 0

    def saw(self, n: int) -> None:
        """n bytes more have arrived. TryAgain if they are too few for the time that they took."""
        self.bytes += n
        seconds = time.monotonic() - self.since
        if seconds < self.timeout:
            return
        if self.bytes < SLOWEST * seconds:
            raise TryAgain(f"only {self.bytes} bytes came in the last {seconds:.0f} s")
        self.since = time.monotonic()
        self.bytes = 0


def find_problem(part: Path, length: int, size: int | None, sha256: str | None) -> str | None:
    """What is wrong with a file that has arrived as a whole, in words; None where nothing is."""
    if sha256:
        with part.open("rb") as f:
            actual = hashlib.file_digest(f, "sha256").hexdigest()
        if actual != sha256:
            return f"a file of SHA-256 {actual}, not {sha256}"
    if size is not None and length > size:
        return f"{length} bytes, not {size}"
    return None
