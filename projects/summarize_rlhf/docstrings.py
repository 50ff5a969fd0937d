"""
Summaries that are on every machine: the docstrings of the installed packages.

PEP 257 asks for a docstring of one line that sums it up, an empty line, and the details. So each
docstring that keeps to it is a text with a summary by the same author. They are parsed out of the
source files with `ast`: nothing is imported or run.
"""

import ast
import inspect
import re
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

# Folders whose docstrings say little, or are copies of another package's.
SKIPPED = {
    "test", "tests", "testing", "_test", "idlelib", "lib2to3",
    "site-packages", "dist-packages", "_vendor", "vendor", "third_party",
}
SUMMARY = re.compile(r"[A-Z][^\n]{15,140}[.]")  # one line, from a capital letter to a full stop
UNDERLINE = re.compile(r"^\W*([-=~^*#_+.\s])\1{2,}\W*$")  # of a heading
MIN_BODY_WORDS = 12  # a shorter body has nothing to sum up


def read_docstrings(packages: str = "") -> list[dict]:
    """Rows of module, body and summary, without copies.

    packages: names with commas between them ("json,torch"); empty means all that are installed.
    ValueError for a package that is not installed.
    """
    files = source_files([name for name in packages.split(",") if name])
    with ProcessPoolExecutor() as pool:
        rows_of_files = pool.map(docstrings_of_file, files.values(), files.keys(), chunksize=64)
        bar = tqdm(rows_of_files, "docstrings", total=len(files), disable=None)
        return without_copies([row for rows in bar for row in rows])


def without_copies(rows: list[dict]) -> list[dict]:
    """The rows that share neither the summary nor the beginning of the body with an earlier one.

    Only letters and digits are compared, because copies differ in spaces and punctuation.
    """
    kept = []
    seen = set()
    for row in rows:
        keys = {letters(row["summary"]), letters(row["body"])[:80]}
        if not keys & seen:
            kept.append(row)
        seen |= keys
    return kept


def letters(text: str) -> str:
    """The text in lower case, without spaces and punctuation."""
    return re.sub(r"\W+", "", text).lower()


def source_files(packages: list[str]) -> dict[str, Path]:
    """{dotted name: file} of the packages' modules, sorted; of all packages where none is named.

    ValueError for a package that is not installed.
    """
    files = {}
    for kind in ("purelib", "platlib", "stdlib"):  # the last one that has a module wins
        root = Path(sysconfig.get_paths()[kind])
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED.isdisjoint(parts) and (not packages or parts[0] in packages):
                files[".".join(parts).removesuffix(".__init__")] = path
    missing = set(packages) - {name.partition(".")[0] for name in files}
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(
            f"--data.packages: {names} is not installed here, or not written in Python: "
            "install it, or leave it out"
        )
    return {name: files[name] for name in sorted(files)}


def docstrings_of_file(path: Path, module: str) -> list[dict]:
    """The docstrings of one source file that have a summary and a body."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []  # a template, a file for another Python, or one in another encoding
    rows = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            pair = split_docstring(text) if text is not None else None
            if pair is not None:
                rows.append({"module": module, **pair})
    return rows


def split_docstring(text: str) -> dict | None:
    """{"body", "summary"} of a docstring that keeps to PEP 257, else None."""
    summary, _, body = inspect.cleandoc(text).partition("\n\n")
    summary = " ".join(summary.split())
    lines = [" ".join(line.split()) for line in body.splitlines() if not UNDERLINE.match(line)]
    body = "\n".join(line for line in lines if line)
    if not SUMMARY.fullmatch(summary) or len(body.split()) < MIN_BODY_WORDS:
        return None
    if not (summary + body).isascii():
        return None
    return {"body": body, "summary": summary}
