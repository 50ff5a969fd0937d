"""
Find the files of a model: on this machine, or else on the Hugging Face hub.

What is fetched from the hub is kept in $MINGPT_HOME, a folder for each model and revision, laid out
as the hub's own. HF_ENDPOINT and HF_TOKEN are honoured, as in Hugging Face's programs.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

from mingpt import gguf
from mingpt.checkpoint import finish_write, read_json, read_text, write_text
from mingpt.download import NotFound, download, home

logger = logging.getLogger("mingpt")

# The names under which a folder or a repository keeps its weights; the first that exists is taken.
WEIGHT_FILES = (
    "model.safetensors",  # the usual one since 2023
    "model.safetensors.index.json",  # large models are cut into several files: this lists them
    "pytorch_model.bin",  # a state dict, saved with torch.save: the usual one until 2023
    "pytorch_model.bin.index.json",  # ... and the list of its pieces
)

# What a model may have beside its weights and its config: how it ends a text, and its tokenizer.
# All of it is optional.
OTHER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

# In a folder of the hub's files: which of OTHER_FILES the hub has not, one a line.
ABSENT = "absent.txt"


def find_pretrained(name_or_path: str | Path, revision: str = "main", weights: bool = True) -> Path:
    """The folder or file of a model: `name_or_path` itself if it exists, else what is fetched.

    "smollm2" is SmolLM2-135M-Instruct, a .gguf file that comes through pip. Any other name is one
    of the hub, "gpt2" or "user/repo", and revision a branch, tag or commit there. With
    weights=False only the small files are fetched, a tokenizer's among them.

    Raises ValueError for a name or path that does not exist.
    """
    path = Path(name_or_path).expanduser()
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        finish_write(path if path.is_dir() else path.parent)
        return path
    if str(name_or_path) == "smollm2":
        return gguf.smollm2()
    return hub_folder(str(name_or_path), revision, weights)


def hub_folder(name: str, revision: str, weights: bool = True) -> Path:
    """The local folder with a model of the hub, downloaded unless it is already there.

    Raises ValueError where the hub has no such model, or no weights of it that we read.
    """
    # The name becomes a part of a path on this machine: "../.." must not get through.
    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) or name.startswith("."):
        raise ValueError(
            f"got {name!r}; expected an existing file or folder, "
            "or a name on the hub, like 'gpt2' or 'user/repo'"
        )
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urlsplit(endpoint).netloc
    revision = quote(revision, safe="")  # "refs/pr/1" is one step of a path, not three
    url = f"{endpoint.rstrip('/')}/{name}/resolve/{revision}"
    folder = home() / "hub" / name.replace("/", "--") / revision
    headers = hub_headers()
    otherwise = (
        f"There is no file or folder {name!r} here. If you meant one, check its path; or download "
        "the model's files elsewhere, and pass the folder that holds them"
    )

    def fetch(file: str, tries: int = 5) -> Path:
        return download(
            f"{url}/{file}",
            folder / file,
            headers=headers,
            tries=tries,
            otherwise=otherwise,
        )

    if not (folder / "config.json").exists():
        # A warning, because that also shows where nobody has set up logging.
        logger.warning(
            "%r is no file or folder here: asking %s for a model of that name", name, host
        )
    fetch("config.json")
    if weights:
        fetch_weights(fetch, folder, name, endpoint)
    fetch_others(fetch, folder)
    return folder


def fetch_weights(fetch: Callable[..., Path], folder: Path, name: str, endpoint: str) -> None:
    """Fetch the weights of a model into the folder. ValueError where it has none."""
    # The hub is asked for one name after the other, unless the cache shows which one it has.
    cached = tuple(file for file in WEIGHT_FILES if (folder / file).exists())
    candidates = cached if cached else WEIGHT_FILES
    for file in candidates:
        with contextlib.suppress(NotFound):  # the model has its weights under another name
            for shard in shards(fetch(file)):
                fetch(shard.name)
            return
    raise ValueError(f"{name!r} has no weights at {endpoint}: none of {', '.join(WEIGHT_FILES)}")


def fetch_others(fetch: Callable[..., Path], folder: Path) -> None:
    """Fetch what the hub has of OTHER_FILES, and note what it has not: nothing is asked twice."""
    note = folder / ABSENT
    absent = set(read_text(note).split()) if note.exists() else set()
    asked = [file for file in OTHER_FILES if file not in absent and not (folder / file).exists()]
    try:
        for file in asked:
            try:
                fetch(file, tries=1)
            except NotFound:
                absent.add(file)
        if asked:
            write_text(note, "".join(f"{file}\n" for file in sorted(absent)))
    except (OSError, ValueError) as error:  # no network, say. Whoever needs a file will miss it
        logger.warning("going on without files that a model need not have: %s", error)


def hub_headers() -> dict[str, str]:
    """The user's token for the hub, as a header; {} without one. ValueError if it cannot be one."""
    token = os.environ.get("HF_TOKEN", "").strip()  # a file that it was read from ends its line
    if not token:
        return {}
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("HF_TOKEN holds spaces or other signs that no token has: copy it again")
    return {"Authorization": f"Bearer {token}"}


def weights_file(path: Path) -> Path:
    """The file with the weights, or the index of such files: path itself, or one in this folder."""
    for file in (path, *(path / name for name in WEIGHT_FILES)):
        if file.is_file():
            return file
    raise ValueError(
        f"{path} contains no weights: none of {', '.join(WEIGHT_FILES)}. "
        "If they have another name, pass the path of that file"
    )


def shards(path: Path) -> list[Path]:
    """The files that an index lists, all in its folder; just [path] where path is not an index.

    An index is JSON: {"weight_map": {name of a tensor: name of its file}}. Raises
    ValueError where it names files elsewhere: one from the internet must not choose what is
    read on this machine.
    """
    if not path.name.endswith(".index.json"):
        return [path]
    weight_map = read_json(path).get("weight_map")
    files = []
    if isinstance(weight_map, dict):
        files = sorted({str(file) for file in weight_map.values()})
    if not files or any(Path(file).name != file for file in files):
        raise ValueError(
            f"{path} has a weight_map with the files {files[:3]}; "
            "expected names of files in the same folder"
        )
    return [path.with_name(file) for file in files]
