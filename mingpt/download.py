"""
Files from the network: fetched once, checked, kept, and resumed where a download broke off.

`download` is the loop: it tries until the file is there. `fetch` is one try, and reads as
the story of an HTTP request: what to ask for, what the answer promises, writing it,
checking it. What arrives is collected in a file named `....part`, which takes its real name
only when it is complete and correct. So a file that exists is a file to trust, and a
program that was killed loses nothing.

Servers differ in what they answer. Each function below says which case it takes care of,
and tests/test_weights.py has a server that misbehaves in each of these ways.
"""

import hashlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    # At run time the functions that need requests import it themselves: importing it takes as long
    # as all the rest of this library, and few programs download anything.
    import requests


def home() -> Path:
    """The folder of downloads: $MINGPT_HOME, by default ~/.cache/mingpt."""
    chosen = os.environ.get("MINGPT_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mingpt"


class NotFound(ValueError):
    """The server has no such file (404)."""


def download(
    url: str,
    path: str | Path,
    sha256: str | None = None,
    size: int | None = None,
    headers: dict[str, str] | None = None,
    tries: int = 5,
    timeout: float = 30.0,
) -> Path:
    """Download url to the file `path`, unless that exists. Returns the path.

    An earlier download that broke off is continued. The file takes its name only when its
    size (in bytes) and SHA-256 are right: the given ones, or else those that the server
    announces. headers are added to the request. timeout is how many seconds the server may
    stay silent.

    Network errors and overloaded servers are worth another try, after 1, 2, 4, ... seconds.
    Raises ConnectionError when all tries failed; a later call continues with what has
    arrived. Raises ValueError at once where the server refuses (NotFound for a 404) or
    sends the wrong file.
    """
    import requests

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    failures = 0
    while not path.exists():
        try:
            fetch(url, part, sha256, size, headers, timeout)
            part.rename(path)
        except (requests.RequestException, FileNotFoundError) as error:
            # FileNotFoundError means that another process downloaded the same file at the same
            # time, and has already renamed the part: then the loop ends at its next look.
            raise_if_refused(url, getattr(error, "response", None))
            failures += 1
            if failures == tries and not path.exists():
                message = f"{url} failed {tries} times, at last with: {error}"
                raise ConnectionError(message) from error
            time.sleep(2 ** (failures - 1))
    return path


def raise_if_refused(url: str, response: "requests.Response | None") -> None:
    """Raise ValueError, or NotFound, for an answer that will be the same the next time."""
    if response is None:
        return  # no answer at all: the connection failed
    status = response.status_code
    if status >= 500 or status in (408, 429):
        return  # the server is in trouble, has timed out (408), or gets too many requests (429)
    kind = NotFound if status == 404 else ValueError
    message = f"{url} answers {response.reason} ({status}): is the name right, and may you read it?"
    raise kind(message) from None  # the HTTPError behind it would tell the user nothing more


def fetch(
    url: str,
    part: Path,
    sha256: str | None,
    size: int | None,
    headers: dict[str, str] | None,
    timeout: float,
) -> None:
    """One try of `download`: add to the file `part` what it lacks, and check the result.

    Raises one of requests' errors where another try may help, and ValueError where it will not.
    """
    import requests

    done = part.stat().st_size if part.exists() else 0
    ask_for = request_headers(done, headers)
    with requests.get(url, headers=ask_for, stream=True, timeout=timeout) as answer:
        if cannot_continue(answer, done):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f"cannot continue from byte {done}")
        if answer.status_code not in (200, 206):
            raise requests.HTTPError(f"it answers {answer.status_code}", response=answer)

        # 206 sends the rest, as asked. 200 sends the whole file even where we asked for the rest:
        # many simple servers ignore the Range header, Python's own http.server among them.
        start = done if answer.status_code == 206 else 0
        if not size:
            size = announced_size(answer)
        if not sha256:
            sha256 = announced_sha256(answer)
        length = write_body(answer, part, start, size)

    if size and length < size:
        raise requests.ConnectionError(f"the connection ended after {length} of {size} bytes")
    problem = find_problem(part, length, size, sha256)
    if problem:
        part.unlink()
        # Bytes of an earlier try may be to blame, and then a fresh start can help. But a server
        # that sent all of a wrong file would only send it again.
        kind = requests.ConnectionError if start else ValueError
        raise kind(f"{url} sends {problem}")


def request_headers(done: int, headers: dict[str, str] | None) -> dict[str, str]:
    """The headers that ask for a file, or for all of it but the first `done` bytes."""
    # "identity" asks for the file as it is. Compressed on the way, as web servers like to do with
    # text, its bytes could be neither counted nor continued from the middle.
    ask_for = {"Accept-Encoding": "identity", **(headers or {})}
    if done:
        ask_for["Range"] = f"bytes={done}-"
    return ask_for


def cannot_continue(answer: "requests.Response", done: int) -> bool:
    """Whether our first `done` bytes are no beginning of what the server has, or sends.

    416 says that the file ends before byte `done`: our part is of another file or version,
    or was already complete when a program was killed. And a 206 must begin where we asked
    it to; a cache between us and the server may send another range.
    """
    if answer.status_code == 416:
        return True
    sent_range = answer.headers.get("Content-Range", "")
    return answer.status_code == 206 and not sent_range.startswith(f"bytes {done}-")


def announced_size(answer: "requests.Response") -> int | None:
    """The size of the whole file in bytes, as far as the answer tells it; else None."""
    # A server that compresses although we asked it not to counts the compressed bytes, while
    # requests hands us the unpacked ones.
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return None
    # A 206 says "Content-Range: bytes 100-199/1000", or "/*" where it does not know the whole; its
    # Content-Length is only that of the rest. A 200 says "Content-Length: 1000", or nothing where
    # it makes up the file as it sends it.
    length = answer.headers.get("Content-Length", "")
    total = answer.headers.get("Content-Range", length).rpartition("/")[2]
    if not total.isdecimal():
        return None
    # The Hugging Face hub gives the size of a large file in a header of its own.
    linked_size = last_header(answer, "X-Linked-Size")
    return int(linked_size) if linked_size else int(total)


def announced_sha256(answer: "requests.Response") -> str | None:
    """The SHA-256 that the Hugging Face hub gives for its large files; else None."""
    # An ETag may be anything that changes with the file, and only this form can be checked.
    etag = last_header(answer, "X-Linked-Etag").strip('"')
    return etag if re.fullmatch("[0-9a-f]{64}", etag) else None


def last_header(answer: "requests.Response", name: str) -> str:
    """A header of the answer, or of the last redirect on the way to it that has one; else "".

    The Hugging Face hub describes a file in its own answer, which redirects us to another server.
    """
    for response in (answer, *reversed(answer.history)):
        if name in response.headers:
            return response.headers[name]
    return ""


def write_body(answer: "requests.Response", part: Path, start: int, size: int | None) -> int:
    """Write the answer's body into `part`, from byte `start` on. Returns where it ended.

    Two processes that download the same file do no harm: they write the same bytes to the
    same places.
    """
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
        for chunk in answer.iter_content(2**16):
            f.write(chunk)
            bar.update(len(chunk))
        end = f.tell()
        # Cut off what an older, longer version of the file may have left behind the end. But where
        # the connection broke, what an earlier try has written there is still of use.
        if not size or end >= size:
            f.truncate()
        f.flush()
        os.fsync(f.fileno())
    return end


def find_problem(part: Path, length: int, size: int | None, sha256: str | None) -> str | None:
    """What is wrong with a file that has arrived as a whole, in words; None where nothing is."""
    if sha256:
        with part.open("rb") as f:
            actual = hashlib.file_digest(f, "sha256").hexdigest()
        if actual != sha256:
            return f"a file of SHA-256 {actual}, not {sha256}"
    if size and length > size:
        return f"{length} bytes, not {size}"
    return None
