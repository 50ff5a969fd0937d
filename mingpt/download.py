"""
Files from the network: fetched once, checked, kept, and gone on with where a fetch was interrupted.
"""

import hashlib
import os
import re
import time
from pathlib import Path

from tqdm import tqdm


def home() -> Path:
    """Where downloads are kept: $MINGPT_HOME, by default ~/.cache/mingpt."""
    return Path(os.environ.get("MINGPT_HOME") or Path.home() / ".cache" / "mingpt")


class NotFound(ValueError):
    """The server has no such file (404)."""


def download(url: str, path: str | Path, sha256: str | None = None, size: int | None = None, headers: dict | None = None,
             tries: int = 5, timeout: float = 30.0) -> Path:
    """Fetch url into the file `path`, unless it is there already; an interrupted download goes on where it stopped.

    The file takes its name only when its size (bytes) and SHA-256 are right: the given ones, else those that the server names. After
    trouble it tries again, in 1, 2, 4 ... seconds. Raises ValueError where the server refuses (404 ...) or sends something
    else than expected, ConnectionError where every try fails; the next call goes on with what has come.
    """
    import requests  # here, since it takes as long as all the rest of this library, and few programs download
    (path := Path(path)).parent.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while not path.exists():
        try:
            fetch(url, Path(f"{path}.part"), sha256, size, headers, timeout).rename(path)
        except (requests.RequestException, FileNotFoundError) as error:  # not found: another process has renamed the part
            response = getattr(error, "response", None)
            status = 500 if response is None else response.status_code
            if status < 500 and status not in (408, 429):
                raise (NotFound if status == 404 else ValueError)(
                    f"{url} answers {response.reason} ({status}): is the name right, and may you read it?") from None
            if (attempt := attempt + 1) == tries and not path.exists():
                raise ConnectionError(f"{url} failed {tries} times, at last with: {error}") from error
            time.sleep(2 ** (attempt - 1))
    return path


def fetch(url: str, part: Path, sha256: str | None, size: int | None, headers: dict | None, timeout: float) -> Path:
    """One try of `download`: add to part what it lacks, and check it. Raises requests' errors where another try may help."""
    import requests
    done = part.stat().st_size if part.exists() else 0
    ask = {"Accept-Encoding": "identity", **(headers or {}), **({"Range": f"bytes={done}-"} if done else {})}
    with requests.get(url, headers=ask, stream=True, timeout=timeout) as answer:
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if answer.status_code == 416 or answer.status_code == 206 and not goes_on:  # our part is another file's, then
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f"cannot go on from byte {done}")
        if answer.status_code not in (200, 206):
            raise requests.HTTPError(f"it answers {answer.status_code}", response=answer)
        done = done if answer.status_code == 206 else 0  # 200 brings the whole file, whatever we asked for
        hub = requests.structures.CaseInsensitiveDict(header for a in (*answer.history, answer) for header in a.headers.items())  # it redirects
        total = answer.headers.get("Content-Range", answer.headers.get("Content-Length", "") * (done == 0)).rpartition("/")[2]
        if answer.headers.get("Content-Encoding", "identity") == "identity" and total.isdecimal():  # else it speaks of a zip
            size = size or int(hub.get("X-Linked-Size", total))
        linked = hub.get("X-Linked-Etag", "").strip('"')  # a large file's SHA-256
        sha256 = sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None)
        # two processes that fetch the same file do no harm: they write the same bytes to the same places
        with part.open("r+b" if part.exists() else "wb") as f, \
                tqdm(desc=part.stem, total=size or None, initial=done, unit="B", unit_scale=True, disable=None) as bar:
            f.seek(done)
            for chunk in answer.iter_content(2 ** 16):
                bar.update(f.write(chunk))
            got = f.tell()
            if not size or got >= size:  # whole: what follows is of another version
                f.truncate()
            f.flush()
            os.fsync(f.fileno())
    if size and got < size:
        raise requests.ConnectionError(f"the connection ended after {got} of {size} bytes")
    with part.open("rb") as f:
        wrong = f"{got} bytes, not {size}" if size and got > size else None
        if sha256 and (actual := hashlib.file_digest(f, "sha256").hexdigest()) != sha256:
            wrong = f"a file of SHA-256 {actual}, not {sha256}"
    if wrong:
        part.unlink()  # of a part that was there before, another try is worth it
        raise (requests.ConnectionError if done else ValueError)(f"{url} sends {wrong}")
    return part
