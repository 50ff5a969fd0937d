"""
Files from the network: fetched once, checked, kept, and resumed where a download broke off.

`download` tries until the file is there. `complete` is one try, and reads as the story of an HTTP
request: what to ask for, what the answer promises, writing it, checking it. What arrives is
collected in a file named `....part`, which takes its real name only when it is complete and
correct. So a file that exists is a file to trust, and a program that was killed loses nothing.

Servers differ in what they answer, and not all mean well. Each function below says which case
it takes care of, and tests/test_download.py has a server that misbehaves in each of these ways.
"""

import contextlib
import hashlib
import logging
import math
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self
from urllib.parse import urljoin

from tqdm import tqdm

from mingpt.config import CfgNode, check_numbers

if TYPE_CHECKING:
    # At run time the functions that need requests import it themselves: importing it takes as long
    # as all the rest of this library, and few programs download anything.
    import filelock
    import requests

logger = logging.getLogger("mingpt")

REDIRECTS = 10  # as many as a browser follows, at most
SLOWEST = 1024  # bytes per second; a server that sends less for a whole `timeout` is given up
LARGEST_UNANNOUNCED = 10 * 2**30  # bytes; where nobody says how large a file is, it ends here
# The default deadline of a download: ten minutes, and one second for every 10 kB that arrives.
DEADLINE_SECONDS = 600
DEADLINE_BYTES_PER_SECOND = 10_000


def home() -> Path:
    """The folder of downloads: $MINGPT_HOME, by default ~/.cache/mingpt."""
    chosen = os.environ.get("MINGPT_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mingpt"


class NotFound(ValueError):
    """The server has no such file (404)."""


class TryAgain(Exception):
    """A try has failed in a way that another one may mend. The message is for people."""


class StartAgain(TryAgain):
    """What arrived in an earlier try cannot be used, and has been removed."""


@dataclass
class Job:
    """What `download` was asked for; its docstring explains the fields."""

    url: str
    path: Path
    sha256: str | None
    size: int | None
    headers: dict[str, str]
    timeout: float
    clock: "Clock"

    @property
    def shown_url(self) -> str:
        """The url for messages: without a user's name and password, which end with an @."""
        return re.sub("//[^/@]*@", "//", self.url)


def download(
    url: str,
    path: str | Path,
    sha256: str | None = None,
    size: int | None = None,
    headers: dict[str, str] | None = None,
    tries: int = 5,
    timeout: float = 30.0,
    otherwise: str = "",
    deadline: float | None = None,
) -> Path:
    """Download url to the file `path`, unless that exists. Returns the path.

    An earlier download that broke off is continued. The file takes its name only when its size
    (in bytes) and SHA-256 are right: the given ones, or else those that the server announces.
    Where nobody knows the size, the file may have 10 GiB.

    headers are added to the request, and are sent to no other server than the url's. timeout is
    how many seconds the server may stay silent, or send less than 1 kB a second. deadline is how
    many seconds all of it may take, with all tries and pauses; by default ten minutes, and one
    second more for every 10 kB that arrives. If several processes want the same file, one
    downloads it and the others wait. otherwise: a sentence for the errors, on what a person can
    do instead.

    Network errors and overloaded servers are worth another try, after 1, 2, 4, ... seconds. Raises
    ConnectionError when all tries failed; a later call continues with what has arrived. Raises
    ValueError at once where an argument is wrong, and where the server refuses (NotFound for a
    404) or sends the wrong file. Raises OSError where the file cannot be written, or its lock in
    the folder `locks` of $MINGPT_HOME.
    """
    path = Path(path)
    check_arguments(url, path, tries, timeout, size, sha256, deadline)
    job = Job(url, path, sha256, size, check_headers(headers), timeout, Clock(deadline))
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with one_at_a_time(path, job.clock):
            if not path.exists():  # else another process downloaded it while this one waited
                fetch_patiently(job, tries)
    except (ConnectionError, ValueError) as error:
        if otherwise:
            error.args = (f"{error}. {otherwise}",)  # its message
        raise
    return path


def fetch_patiently(job: Job, tries: int) -> None:
    """Fetch the file in so many tries. ConnectionError when all failed, or no time is left."""
    for failures in range(1, tries + 1):
        try:
            fetch(job)
            return
        except TryAgain as error:
            wait = 2 ** (failures - 1)
            if failures == tries or job.clock.left() < wait:
                times = "once" if failures == 1 else f"{failures} times, the last time"
                raise ConnectionError(f"{job.shown_url} failed {times} because {error}") from error
            # A warning, since a program that has not set up any logging shows it, too.
            logger.warning("retrying in %d s (%d of %d): %s", wait, failures + 1, tries, error)
            time.sleep(wait)


def check_arguments(
    url: str,
    path: Path,
    tries: int,
    timeout: float,
    size: int | None,
    sha256: str | None,
    deadline: float | None,
) -> None:
    """ValueError for arguments of `download` that are out of range."""
    if not re.match(r"https?://[^/]", str(url), re.IGNORECASE):
        raise ValueError(f"url={url!r} must begin with http:// or https:// and a server's name")
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder; expected the name of a file in it")
    check_numbers(CfgNode(tries=tries), "tries", low=1, whole=True)
    check_numbers(CfgNode(timeout=timeout), "timeout", low=0.001)
    check_numbers(CfgNode(size=size), "size", whole=True, optional=True)
    check_numbers(CfgNode(deadline=deadline), "deadline", low=0.001, optional=True)
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", str(sha256)):
        raise ValueError(f"sha256={sha256!r} must be 64 hexadecimal digits in lower case")


def check_headers(headers: dict[str, str] | None) -> dict[str, str]:
    """The headers without the blanks at their ends, which files with tokens in them often have.

    Raises ValueError for a header that cannot be sent. It does not show it: it may be secret.
    """
    if not isinstance(headers, (dict, NoneType)):
        raise ValueError(f"headers is {headers!r:.60}; expected a dict, {{name: value}}")
    stripped = {}
    for name, value in (headers or {}).items():
        text = value.strip() if isinstance(value, str) else "\n"
        if not (text.isascii() and text.isprintable()):
            raise ValueError(f"the header {name!r} must be one line of printable ASCII characters")
        stripped[name] = text
    return stripped


def fetch(job: Job) -> None:
    """One try of `download`: the rest of the file, or all of it where the rest does not help.

    Raises TryAgain where another try may help, and ValueError where it will not.
    """
    try:
        complete(job)
    except StartAgain as reason:
        logger.info("%s: starting from the beginning, since %s", job.path.name, reason)
        complete(job)  # now there is nothing that could be of another file


def complete(job: Job) -> None:
    """Fetch what is missing in the part, check it, and give it its name."""
    part = Part(job.path)
    size, sha256 = job.size, job.sha256
    if size is not None and part.length() > size:
        part.remove()
    done = part.length()
    with request(job, part.ask_for_rest()) as answer:
        refuse_failure(job, answer)
        refuse_compression(job, answer)
        if size is None:
            size = announced_size(answer)
        if sha256 is None:
            sha256 = announced_sha256(answer)
        reason = part.why_not_continued(answer, done, size, sha256)
        if reason:
            part.remove()
            raise (StartAgain if done else TryAgain)(reason)

        # 206 sends the rest, as asked. 200 sends the whole file even where we asked for the rest:
        # many simple servers ignore the Range header, Python's own http.server among them. And it
        # is the answer to If-Range where the file has changed.
        start = done if answer.status_code == 206 else 0
        if start == 0:
            part.begin(answer)
        length = write_body(job, answer, part.path, start, size)

    if size is not None and length < size:
        raise TryAgain(f"the connection ended after {length} of {size} bytes")
    problem = find_problem(part.path, length, size, sha256)
    if problem:
        part.remove()
        # Bytes of an earlier try may be to blame, and then a fresh start can help. But a server
        # that sent all of a wrong file would only send it again.
        raise (StartAgain if start else ValueError)(f"{job.shown_url} sends {problem}")
    part.take_name()


# --------------------------------------------------------------------------------------------------
# waiting: for other processes, and for how long


@contextlib.contextmanager
def one_at_a_time(path: Path, clock: "Clock | None" = None) -> Iterator[None]:
    """Within, no other process downloads to this path. A process that is killed lets go of it.

    Raises ConnectionError when the clock's deadline passes while others hold the lock. A
    clock without a deadline starts when the waiting ends. Raises OSError where nothing can
    be locked.
    """
    from filelock import FileLock

    clock = clock or Clock()
    # The lock's own file stands in a folder of locks, for it cannot be removed safely.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    # Whoever may write into that folder may use the lock: a group can share a cache.
    lock = FileLock(locks / f"{name}.lock", mode=0o666)
    wait_for(lock, path, clock)
    try:
        clock.begin()
        yield
    finally:
        lock.release()


def wait_for(lock: "filelock.BaseFileLock", path: Path, clock: "Clock") -> None:
    """Acquire the lock, and say every minute that others hold it."""
    from filelock import Timeout

    seconds = 0.0
    while True:
        try:
            lock.acquire(timeout=seconds)
            return
        except Timeout:
            if clock.left() <= 0:
                problem = f"another process still downloads {path}, after {clock.deadline} s"
                raise ConnectionError(problem) from None
            logger.info("%s: waiting for another process, which downloads it", path.name)
            seconds = max(0.0, min(60.0, clock.left()))


class Clock:
    """How long a download may still take: `deadline` seconds in all, from now on.

    Without a deadline it is ten minutes, and longer the more arrives. So a server that
    sends hardly anything is given up, and a large file over a slow line is not.
    """

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline
        self.bytes = 0  # how many have arrived
        # Waiting for another process counts only against a deadline of the caller's.
        self.start = math.inf if deadline is None else time.monotonic()

    def begin(self) -> None:
        """Start the clock, unless it runs already."""
        self.start = min(self.start, time.monotonic())

    def allowed(self) -> float:
        """How many seconds the download may take in all."""
        if self.deadline is not None:
            return self.deadline
        return DEADLINE_SECONDS + self.bytes / DEADLINE_BYTES_PER_SECOND

    def left(self) -> float:
        """How many seconds are left. Infinity before the start, negative behind the end."""
        return self.start + self.allowed() - time.monotonic()


# --------------------------------------------------------------------------------------------------
# what has arrived so far

# An ETag or a date, as far as it can stand in a file and in a header.
VERSION = re.compile("[ -~]{1,1000}")


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
        """What the server called the version that has begun to arrive; "" where that is unknown."""
        if not self.version_path.exists():
            return ""
        version = self.version_path.read_text(encoding="utf-8", errors="replace")
        return version if VERSION.fullmatch(version) else ""

    def ask_for_rest(self) -> dict[str, str]:
        """The headers that ask for what is missing."""
        if not self.length():
            return {}
        rest = {"Range": f"bytes={self.length()}-"}
        # The rest only if it is still the same file, else all of the new one.
        if self.version():
            rest["If-Range"] = self.version()
        return rest

    def why_not_continued(
        self, answer: "requests.Response", done: int, size: int | None, sha256: str | None
    ) -> str | None:
        """Why our first `done` bytes cannot be joined to what the server sends; None if they can.

        416 says that the file ends before byte `done`: our part is of another file or version,
        or was already complete when a program was killed. And a 206 must begin where we asked it
        to, and be of our version; a cache between us and the server may send another range.
        """
        if answer.status_code == 200:  # all of the file: there is nothing to join
            return None
        if answer.status_code == 416:
            return "the file on the server ends before what has arrived so far"
        content_range = answer.headers.get("Content-Range", "")
        if not content_range.startswith(f"bytes {done}-"):
            return "the server sends another piece of the file than what is missing"
        version = version_of(answer)
        if version and self.version() and version != self.version():
            return "what has arrived so far is of another version of the file"
        # Without a version and a checksum nobody would notice that the file has changed, and
        # without a size and a checksum nobody would notice that more of it is missing.
        if not sha256 and ((done and not self.version()) or size is None):
            return "the server does not say enough to continue what has arrived so far"
        return None

    def begin(self, answer: "requests.Response") -> None:
        """Forget what has arrived, and keep what the server calls the version that comes now."""
        self.remove()  # first, so that no part is ever taken for another version
        version = version_of(answer)
        if version:
            self.version_path.write_text(version, encoding="utf-8")

    def remove(self) -> None:
        """Forget what has arrived."""
        self.path.unlink(missing_ok=True)
        self.version_path.unlink(missing_ok=True)

    def take_name(self) -> None:
        """Give the file its name."""
        self.path.replace(self.final_path)
        self.version_path.unlink(missing_ok=True)


def version_of(answer: "requests.Response") -> str:
    """A text that changes when the file does: a strong ETag, or else the date of its change."""
    etag = answer.headers.get("ETag", "")
    # A weak ETag, W/"...", stands for files of the same meaning, which may differ in their bytes.
    version = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
    return version if VERSION.fullmatch(version) else ""


# --------------------------------------------------------------------------------------------------
# the request and its answer


@contextlib.contextmanager
def request(job: Job, rest: dict[str, str]) -> Iterator["requests.Response"]:
    """The answer to a GET, whose body is still to be read. TryAgain if there is none.

    rest: the headers of Part.ask_for_rest.
    """
    import requests
    from urllib3.exceptions import HTTPError

    with new_session() as session:
        try:
            answer = follow(session, job, rest)
        except (requests.RequestException, HTTPError) as error:
            if isinstance(error, ValueError):  # no address, of the caller's or of a redirect
                problem = f"{job.shown_url} leads to no web address ({type(error).__name__})"
                raise ValueError(problem) from error
            raise TryAgain(in_words(error)) from error
        with answer:
            yield answer


def new_session() -> "requests.Session":
    """A session that follows no redirects, and does not read their bodies, however large.

    Even with allow_redirects=False, requests reads the body of a redirect to prepare the next
    request. This session tells it that nothing is a redirect.
    """
    import requests

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> None:
            return None

    return Session()


def follow(session: "requests.Session", job: Job, rest: dict[str, str]) -> "requests.Response":
    """The answer at the end of all redirects; the ones on the way are its `history`."""
    # "identity" asks for the file as it is. Compressed on the way, as web servers like to do
    # with text, its bytes could be neither counted nor continued from the middle.
    headers = {"Accept-Encoding": "identity", **rest, **job.headers}
    history: list[requests.Response] = []
    url = job.url
    while True:
        answer = get(session, url, headers, job)
        if not answer.is_redirect:
            answer.history = history
            return answer
        answer.close()
        history.append(answer)
        if len(history) > REDIRECTS:
            raise ValueError(f"{job.shown_url} redirects more than {REDIRECTS} times")
        try:
            # Headers come as Latin-1, but where an address is not ASCII it is UTF-8.
            target = answer.headers["Location"].encode("latin-1").decode("utf-8")
            url = urljoin(url, target)
            leaves = not same_server(job.url, url)
        except ValueError as error:
            raise ValueError(f"{job.shown_url} redirects to what is no address") from error
        # What may be secret is for the server that we asked, and not for where it sends us.
        if leaves:
            headers = {"Accept-Encoding": "identity", **rest}


def get(
    session: "requests.Session", url: str, headers: dict[str, str], job: Job
) -> "requests.Response":
    """The answer of one server, without its body. TryAgain if it takes too long.

    The timeout of requests is for each read: headers that come byte by byte never end. And it
    begins anew with each address that a server has. So a thread of its own waits for the answer,
    and is left to itself when its time is over: after five timeouts, or at the deadline.
    """
    outcomes: queue.SimpleQueue[requests.Response | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer = session.get(
                url,
                headers=headers,
                timeout=job.timeout,
                stream=True,
                allow_redirects=False,
            )
            outcomes.put(answer)
        except Exception as error:  # it is raised below, in the thread that waits
            outcomes.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        outcome = outcomes.get(timeout=max(0.0, min(5 * job.timeout, job.clock.left())))
    except queue.Empty:
        raise TryAgain("the server does not answer") from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def same_server(asked: str, url: str) -> bool:
    """Whether url is on the server that we asked, and no easier to listen to."""
    from requests.sessions import SessionRedirectMixin

    return not SessionRedirectMixin().should_strip_auth(asked, url)


def in_words(error: Exception) -> str:
    """What has gone wrong with a connection, for people."""
    import requests
    from urllib3.exceptions import ProtocolError

    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not accepted"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy does not let us through"
    cause = error.args[0] if error.args else None
    if isinstance(error, ProtocolError) or isinstance(cause, ProtocolError):
        return "the connection ended before there was an answer"
    if isinstance(error, requests.ConnectionError):
        return "the server cannot be reached, or there is no network"
    return f"the request failed ({type(error).__name__})"


def refuse_failure(job: Job, answer: "requests.Response") -> None:
    """Raise for an answer that brings no file: ValueError if it will be the same the next time."""
    status = answer.status_code
    if status in (200, 206, 416):
        return
    # The name of the status is ours and not the server's, which may put anything in its place.
    names = {known.value: f"{known.phrase} ({known.value})" for known in HTTPStatus}
    name = names.get(status, str(status))
    # The server is in trouble, has timed out (408), or gets too many requests (429).
    if status >= 500 or status in (408, 429):
        raise TryAgain(f"the server answers {name}")
    kind = NotFound if status == 404 else ValueError
    raise kind(f"{job.shown_url} answers {name}: is the name right, and may you read it?")


def refuse_compression(job: Job, answer: "requests.Response") -> None:
    """ValueError for a compressed body, which could be cut, or unpack to any size."""
    for header, plain in (
        ("Content-Encoding", ("", "identity")),
        ("Transfer-Encoding", ("", "identity", "chunked")),
    ):
        encoding = answer.headers.get(header, "").strip().lower()
        if encoding not in plain:
            problem = f"sends the file compressed ({encoding[:40]}), which we did not ask for"
            raise ValueError(f"{job.shown_url} {problem}")


def announced_size(answer: "requests.Response") -> int | None:
    """The size of the whole file in bytes, as far as the answer tells it; else None."""
    # A 206 says "Content-Range: bytes 100-199/1000", or "/*" where it does not know the whole; its
    # Content-Length is only that of the rest. A 200 says "Content-Length: 1000", or nothing where
    # it makes up the file as it sends it.
    length = answer.headers.get("Content-Length", "")
    total = answer.headers.get("Content-Range", length).rpartition("/")[2]
    # The Hugging Face hub gives the size of a large file in a header of its own.
    for number in (hub_header(answer, "X-Linked-Size"), total):
        if re.fullmatch("[0-9]{1,18}", number):
            return int(number)
    return None


def announced_sha256(answer: "requests.Response") -> str | None:
    """The SHA-256 that the Hugging Face hub gives for its large files; else None."""
    # An ETag may be anything that changes with the file, and only this form can be checked.
    etag = hub_header(answer, "X-Linked-Etag").strip('"')
    return etag if re.fullmatch("[0-9a-f]{64}", etag) else None


def hub_header(answer: "requests.Response", name: str) -> str:
    """A header of the server that we asked, "" if it has none.

    The Hugging Face hub describes a file in its own answer, which redirects us to another server.
    What that one says of itself does not count: a mirror must not choose its own checksum. (The
    hub's own answers may be several, since a model that was renamed is redirected on the hub.)
    """
    answers = [*answer.history, answer]
    for each in answers:
        if not same_server(answers[0].url, each.url):
            break
        if name in each.headers:
            return each.headers[name]
    return ""


# --------------------------------------------------------------------------------------------------
# the body


def write_body(
    job: Job,
    answer: "requests.Response",
    part: Path,
    start: int,
    size: int | None,
) -> int:
    """Write the answer's body into `part`, from byte `start` on. Returns where it ended.

    Never more than `size` bytes are written, or LARGEST_UNANNOUNCED where the size is not known:
    if the server sends more, the number that is returned is larger. Raises TryAgain if the
    connection breaks or hardly anything comes, and OSError if the file cannot be written.
    """
    try:
        with part.open("r+b" if part.exists() else "wb") as f:
            f.seek(start)
            try:
                return copy_body(job, answer, f, start, size)
            finally:
                f.flush()
                os.fsync(f.fileno())
    except OSError as error:
        error.filename = str(part)  # a full disk does not say which file it is about
        raise


def copy_body(
    job: Job,
    answer: "requests.Response",
    f: BinaryIO,
    start: int,
    size: int | None,
) -> int:
    """The loop of `write_body`, with a bar that shows how far it is."""
    largest = LARGEST_UNANNOUNCED if size is None else size
    end = start
    with (
        tqdm(
            desc=job.path.name,
            total=size,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None,  # no bar where the output is not a terminal
        ) as bar,
        Watch(answer, job.timeout, job.clock) as watch,
    ):
        for chunk in chunks(answer):
            end += len(chunk)
            if end > largest:
                break
            watch.is_reading = False
            f.write(chunk)
            watch.is_reading = True
            bar.update(len(chunk))
            job.clock.bytes += len(chunk)
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
    """`with Watch(...)`: gives up a body of which too little arrives, or which takes too long.

    Too little is less than SLOWEST bytes a second during a whole timeout. A thread looks at what
    has arrived, because the one that reads may wait for ever inside of one read: for a line that
    comes byte by byte, or that never ends. Hanging up wakes it. Raises TryAgain at the end.
    """

    def __init__(self, answer: "requests.Response", timeout: float, clock: Clock):
        self.answer = answer
        self.timeout = timeout
        self.clock = clock
        self.verdict = ""
        self.is_reading = True  # else it waits for the disk, which is not the server's fault
        self.has_ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Self:
        if not self.answer.raw.closed:  # as it is where there is no body
            # A second handle on the connection, which stays ours when the reader closes its own.
            fileno = self.answer.raw.fileno()
            self.connection = socket.fromfd(fileno, socket.AF_INET, socket.SOCK_STREAM)
            self.thread.start()
        return self

    def run(self) -> None:
        """Wait until it takes too long, and then hang up."""
        while not self.verdict:
            before = self.clock.bytes
            seconds = max(0.01, min(self.timeout, self.clock.left()))
            if self.has_ended.wait(seconds):
                return
            arrived = self.clock.bytes - before
            if self.clock.left() <= 0:
                seconds = self.clock.allowed()
                self.verdict = f"it is not complete after {seconds:.0f} s, its deadline"
            elif seconds < self.timeout or not self.is_reading:
                continue
            elif arrived == 0:
                self.verdict = "the server has fallen silent"
            elif arrived < SLOWEST * seconds:
                self.verdict = f"only {arrived} bytes came in the last {seconds:.1f} s"
        with contextlib.suppress(OSError):  # it may have ended by itself
            self.connection.shutdown(socket.SHUT_RDWR)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.has_ended.set()
        if self.thread.ident is not None:
            self.thread.join()
            self.connection.close()
        if self.verdict and (error is None or isinstance(error, TryAgain)):
            raise TryAgain(self.verdict) from error


def find_problem(part: Path, length: int, size: int | None, sha256: str | None) -> str | None:
    """What is wrong with a file that has arrived as a whole, in words; None where nothing is."""
    largest = LARGEST_UNANNOUNCED if size is None else size
    if length > largest:
        return f"more than {largest} bytes, which is all there may be"
    if sha256:
        with part.open("rb") as f:
            actual = hashlib.file_digest(f, "sha256").hexdigest()
        if actual != sha256:
            return f"a file of SHA-256 {actual}, not {sha256}"
    return None
