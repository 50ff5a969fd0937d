"""
Summaries that are on every machine: the docstrings of the installed packages.

PEP 257 asks for a docstring of one line that sums it up, an empty line, and the details. So each is a text with a summary by its
author. They are parsed out of the source files with `ast`; nothing is imported or run.
"""

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

SKIPPED = {"test", "tests", "testing", "_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "_vendor", "vendor", "third_party"}
SENTENCE = re.compile(r"[A-Z][^\n]{15,140}[.]")  # a summary: one line, from a capital letter to a full stop
RULE = re.compile(r"^\W*([-=~^*#_+.\s])\1{2,}\W*$")  # the underlining of a heading
LEAST_WORDS = 12  # of a body; a shorter one has nothing to sum up


def read_docstrings(packages: str = "") -> list[dict]:
    """Rows of module, body and summary from the installed packages, or from those named ("json,torch"), each text once.

    ValueError for a package that is not installed.
    """
    files = source_files([name for name in packages.split(",") if name])
    with ProcessPoolExecutor() as pool:
        found = list(tqdm(pool.map(pairs, *zip(*files), chunksize=64), "docstrings", total=len(files), disable=None))
    rows, seen = [], set()
    for row in (row for rows in found for row in rows):
        # copies differ in spaces and punctuation; one that shares its summary or the beginning of its body is a copy
        keys = {letters(row["summary"]), letters(row["body"])[:80]}
        if not keys & seen:
            rows.append(row)
        seen |= keys
    return rows


def letters(text: str) -> str:
    return re.sub(r"\W+", "", text).lower()


def source_files(packages: list[str]) -> list[tuple[Path, str]]:
    """(path, dotted name) of the modules of all packages, or of those named, in the order of their names."""
    files = {}
    for root in {Path(sysconfig.get_paths()[kind]) for kind in ("purelib", "platlib", "stdlib")}:
        for path in root.rglob("*.py"):
            name = path.relative_to(root).with_suffix("").parts
            if not SKIPPED & set(name) and (not packages or name[0] in packages):
                files[".".join(name).removesuffix(".__init__")] = path
    if missing := set(packages) - {name.partition(".")[0] for name in files}:
        raise ValueError(f"--data.packages: {', '.join(sorted(missing))} is not installed here, or not written in Python")
    return [(files[name], name) for name in sorted(files)]


def pairs(path: Path, module: str) -> list[dict]:
    """The docstrings of one source file that have a summary and a body."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's invalid escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []  # a template, or a file in another encoding
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented))
    return [{"module": module, **pair} for text in texts if text and (pair := split_docstring(text))]


def split_docstring(text: str) -> dict | None:
    """{"body", "summary"} of a docstring that keeps to PEP 257, else None."""
    summary, empty, body = inspect.cleandoc(text).partition("\n\n")
    summary = " ".join(summary.split())
    lines = [" ".join(line.split()) for line in body.splitlines() if not RULE.match(line)]
    body = "\n".join(line for line in lines if line)
    if not SENTENCE.fullmatch(summary) or len(body.split()) < LEAST_WORDS or not (summary + body).isascii():
        return None
    return {"body": body, "summary": summary}


def split_of(module: str) -> str:
    """train, valid or test, by a hash of the module: its docstrings are alike, and are not torn apart."""
    bucket = hashlib.sha256(module.encode()).digest()[0] % 20
    return {0: "test", 1: "valid"}.get(bucket, "train")
