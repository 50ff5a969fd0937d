"""
Chat templates, rendered safely.

A chat template is a small program in the language Jinja that comes with a model and writes a
conversation as one text. Like a pickle, it comes from strangers. So it runs in jinja2's sandbox,
which keeps it away from Python's insides. And since a sandbox stops neither an endless loop nor a
text of ten gigabytes, a template that we do not know runs in a child process besides, with limits
of time and memory. `render` does the first, `Renderer` the second.

This file is also the child's program: it must import nothing but jinja2 and the standard library.

Source: `transformers` for what a template may use: two functions (raise_exception, strftime_now),
the filter tojson, the statements break and continue, and the marks of {% generation %}.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 10  # for the renderings of one request
START_SECONDS = 120  # for a child to start, on a machine that is busy
MEMORY = 2**29  # bytes that a child may use, where the operating system has such a limit
CHARACTERS = 2**24  # in a rendered text

# The simplest template that is in wide use: every message between two special tokens.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sha256(template: str) -> str:
    """A template's fingerprint."""
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()


# The templates that are rendered without a child process, by their SHA-256.
KNOWN = {
    sha256(CHATML),
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # SmolLM2's
}


class TemplateError(ValueError):
    """A template could not be rendered.

    index: which of the requested renderings failed; None if the template fails with any messages.
    """

    def __init__(self, message: str, index: int | None = None):
        super().__init__(message)
        self.index = index


# --------------------------------------------------------------------------------------------------
# In the sandbox


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which some templates mark the model's text."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration is this one

    def parse(self, parser: Parser) -> nodes.Node:
        """The node of such a block: its content, with variables of its own."""
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(content, lineno=line)


class SafeNamespace(Namespace):
    """jinja2's namespace(), without names that begin with "_", which mean something to Python."""

    def __init__(*args: Any, **kwargs: Any):  # without self: "self" may be a name, too
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            check_attribute(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_attribute(name)
        Namespace.__setitem__(self, name, value)


def check_attribute(name: Any) -> None:
    """Refuse a name that begins with "_"."""
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may have no attribute {name!r}")


def raise_exception(message: str) -> None:
    """How a template refuses a conversation."""
    raise jinja2.exceptions.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson. jinja2's own is for HTML, and escapes its signs."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.lru_cache(maxsize=16)
def compile_template(template: str) -> jinja2.Template:
    """A template as Python code; jinja2.TemplateSyntaxError where it is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,  # the line end behind a {% ... %} is not written
        lstrip_blocks=True,  # nor are the spaces before it, at the start of a line
        extensions=[Generation, loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = SafeNamespace
    return environment.from_string(template)


def render(template: str, renderings: list[dict[str, Any]], now: float) -> list[str]:
    """The texts of a template, one for each dict of variables.

    now: seconds since 1970, the time that all of them are told. Raises TemplateError.
    """
    index = 0
    texts = []
    try:
        compiled = compile_template(template)
        strftime_now = datetime.datetime.fromtimestamp(now).strftime
        for index, variables in enumerate(renderings):  # noqa: B007  # the error needs it
            texts.append(join_bounded(compiled.generate(variables, strftime_now=strftime_now)))
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {error.message}") from None
    except Exception as error:  # a template can make Python raise anything
        kind = "" if type(error) is jinja2.exceptions.TemplateError else type(error).__name__
        raise TemplateError(": ".join(filter(None, [kind, str(error)])), index) from None
    return texts


def join_bounded(pieces: Any) -> str:
    """The text of the pieces that a template writes; an error when it is far too long."""
    text = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > CHARACTERS:
            raise jinja2.exceptions.TemplateError(f"it writes more than {CHARACTERS} characters")
        text.append(piece)
    return "".join(text)


# --------------------------------------------------------------------------------------------------
# In a child process


class Renderer:
    """`renderer(renderings, now)` is `render`, for one template, in a child if it is unknown.

    The child starts when it is first needed, stays for the next renderings, and ends with this
    object. A process that was forked off, as a DataLoader's workers are, starts one of its own.
    """

    def __init__(self, template: str):
        self.template = template
        self.is_known = sha256(template) in KNOWN
        self.child: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"template": self.template}  # for pickle: a process and a lock cannot travel

    def __setstate__(self, state: dict[str, Any]) -> None:
        Renderer.__init__(self, state["template"])

    def __call__(self, renderings: list[dict[str, Any]], now: float) -> list[str]:
        """The texts. Raises TemplateError, also where time or memory are used up."""
        if self.is_known:
            return render(self.template, renderings, now)
        if self.owner != os.getpid():
            self.child = None  # it is the child of the process that this one was forked from
            self.lock = threading.Lock()  # another thread of that process may have held it
        with self.lock:
            if self.child is None:
                self.start()
            request = {"template": self.template, "renderings": renderings, "now": now}
            answer = self.ask(request, SECONDS)
        if answer is None:
            raise TemplateError(
                f"it took more than {SECONDS} seconds or {MEMORY // 2**20} MB, and was stopped"
            )
        if "error" in answer:
            raise TemplateError(answer["error"], answer["index"])
        return answer["texts"]

    def start(self) -> None:
        """Start the child, and wait until it is ready."""
        # -P: this folder is not where the child looks for modules first.
        command = [sys.executable, "-P", __file__]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.owner = os.getpid()
        weakref.finalize(self, end_child, self.child, self.owner)
        if self.ask({"template": "", "renderings": [], "now": 0}, START_SECONDS) is None:
            raise RuntimeError(f"the child that renders templates does not start: {command}")

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The child's answer to a request; None if it died or had to be killed."""
        child = self.child
        assert child is not None and child.stdin is not None and child.stdout is not None
        # A thread that kills the child in time is the one way that every operating system has.
        timer = threading.Timer(seconds, child.kill)
        timer.daemon = True
        timer.start()
        line = b""
        with contextlib.suppress(OSError):
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        timer.cancel()
        if not line.endswith(b"\n"):
            end_child(child, self.owner)
            self.child = None
            return None
        return json.loads(line)


def end_child(child: subprocess.Popen[bytes], owner: int) -> None:
    """End a child of this process; one that another process started is left alone."""
    if owner != os.getpid():
        return
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not sent yet cannot be sent any more
                pipe.close()


def limit_memory() -> None:
    """Let this process use MEMORY bytes at most, where the operating system can do that."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def serve() -> None:
    """The child's program: a request a line on stdin, and its answer, a line on stdout."""
    limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # If nobody is left to kill this process, it must not run for ever.
        timer = threading.Timer(2 * SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()
        try:
            texts = render(request["template"], request["renderings"], request["now"])
            answer_line = json.dumps({"texts": texts})
        except TemplateError as error:
            answer_line = json.dumps({"error": str(error), "index": error.index})
        timer.cancel()
        sys.stdout.buffer.write(answer_line.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
