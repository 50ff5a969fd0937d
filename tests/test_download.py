"""Downloads, from a server that misbehaves, and where they are kept."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from mingpt import download as module
from mingpt.download import download, home
from tests.common import ROOT, Server, TempDirTestCase

BODY = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(BODY).hexdigest()


class TestHome(TempDirTestCase):
    def test_the_environment_names_the_folder(self):
        with mock.patch.dict(os.environ, {"MINGPT_HOME": str(self.folder)}):
            self.assertEqual(home(), self.folder)

    def test_by_default_it_is_in_the_users_cache(self):
        with mock.patch.dict(os.environ):
            os.environ.pop("MINGPT_HOME", None)
            self.assertEqual(home(), Path.home() / ".cache" / "mingpt")


class DownloadTestCase(TempDirTestCase):
    """Downloads one file, without the pauses between tries."""

    HALF = f"bytes={len(BODY) // 2}-"
    THREE_QUARTERS = f"bytes={len(BODY) * 3 // 4}-"

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch("time.sleep"))
        home = {"MINGPT_HOME": str(self.folder / "home")}
        self.enterContext(mock.patch.dict(os.environ, home))
        self.path = self.folder / "deep" / "file.bin"
        self.part = self.folder / "deep" / "file.bin.part"
        self.server = self.enterContext(Server({"/file.bin": BODY}))
        self.url = self.server.url + "/file.bin"

    def download(self, moods=(), **options):
        self.server.moods = list(moods)
        return download(self.url, self.path, **{"sha256": SHA256, "timeout": 0.5, **options})

    def assert_final(self, message, moods=(), **options):
        """It is not tried again, and nothing is left of it."""
        with self.assertRaisesRegex(ValueError, message):
            self.download(moods, **options)
        self.assertEqual(os.listdir(self.path.parent), [])


class TestDownload(DownloadTestCase):
    def assert_arrives(self, moods, ranges):
        """The file is right after trouble, which took requests with these Range headers."""
        for _ in range(2):  # the second time, the file is there, and nothing is asked for
            self.assertEqual(self.download(moods).read_bytes(), BODY)
        self.assertEqual([headers.get("Range") for _, headers in self.server.seen], ranges)
        self.assertEqual(os.listdir(self.path.parent), ["file.bin"])

    def test_once_is_enough(self):
        self.assert_arrives([], [None])

    def test_a_slow_server(self):
        self.assert_arrives(["slow"], [None])

    def test_a_server_in_trouble(self):
        self.assert_arrives([500, 503, 429], [None] * 4)

    def test_a_connection_that_ends(self):
        self.assert_arrives(["cut"], [None, self.HALF])

    def test_a_connection_that_falls_silent(self):
        self.assert_arrives(["stall"], [None, self.HALF])

    def test_a_server_that_ignores_the_range(self):
        self.assert_arrives(["cut", "no range"], [None, self.HALF])

    def test_a_server_that_sends_another_range(self):
        self.assert_arrives(["cut", "wrong range"], [None, self.HALF, None])

    def test_a_rest_that_is_corrupt(self):
        self.assert_arrives(["cut", "corrupt"], [None, self.HALF, None])

    def test_a_server_that_sends_less_than_the_range(self):
        self.assert_arrives(["cut", "short range"], [None, self.HALF, self.THREE_QUARTERS])

    def test_a_part_stays_when_all_tries_failed(self):
        with self.assertRaisesRegex(ConnectionError, "failed 2 times, the last time because"):
            self.download(["cut", "cut"], tries=2)
        self.assertEqual(os.listdir(self.path.parent), ["file.bin.part"])
        self.assertEqual(self.download().read_bytes(), BODY)
        _, headers = self.server.seen[-1]
        self.assertEqual(headers.get("Range"), self.THREE_QUARTERS)

    def test_a_part_of_another_file(self):
        self.part.parent.mkdir()
        for n in (10, len(BODY), len(BODY) + 1):
            with self.subTest(bytes=n):
                self.path.unlink(missing_ok=True)
                self.part.write_bytes(b"x" * n)
                self.assertEqual(self.download().read_bytes(), BODY)

    def test_many_at_once(self):
        self.server.moods = ["slow"] * 8

        def download_once(_):
            return download(self.url, self.path, SHA256, len(BODY))

        with ThreadPoolExecutor(4) as pool:
            for path in pool.map(download_once, range(4)):
                self.assertEqual(path.read_bytes(), BODY)
        self.assertEqual(os.listdir(self.path.parent), ["file.bin"])

    def test_a_file_that_is_not_there(self):
        self.assert_final("answers Not Found \\(404\\)", moods=[404])

    def test_a_file_that_may_not_be_read(self):
        self.assert_final("may you read it", moods=[401])

    def test_a_corrupt_file(self):
        self.assert_final("SHA-256 .*, not", moods=["corrupt"])

    def test_a_file_of_another_size(self):
        self.assert_final("sends more than 10 bytes", size=10)

    def test_no_server(self):
        with self.assertRaisesRegex(ConnectionError, "failed 2 times"):
            download("http://127.0.0.1:9/nobody", self.path, tries=2)

    def test_what_goes_wrong_is_said_in_plain_words(self):
        with self.assertLogs("mingpt", "INFO") as logs:
            self.download(["stall", 503])
        lines = [record.getMessage() for record in logs.records]
        self.assertEqual(
            lines,
            [
                "retrying in 1 s (2 of 5): the server has fallen silent",
                "retrying in 2 s (3 of 5): the server answers Service Unavailable (503)",
            ],
        )

    def test_in_the_end_it_says_what_to_do_instead(self):
        with self.assertRaisesRegex(ConnectionError, "no network. Or walk$"):
            download("http://127.0.0.1:9/nobody", self.path, tries=1, otherwise="Or walk")

    def test_arguments_out_of_range(self):
        for name, value in (
            ("tries", 0),
            ("tries", 1.5),
            ("timeout", 0),
            ("size", -1),
            ("sha256", "abc"),
        ):
            with self.assertRaisesRegex(ValueError, f"{name}={value!r}"):
                self.download(**{name: value})


class TestServersThatLieOrDrip(DownloadTestCase):
    """What a server may send besides the file."""

    def test_more_than_it_announced(self):
        self.server.headers["/file.bin"] = {"Content-Length": str(10**9)}
        self.assert_final("sends more than 1000 bytes", ["endless"], size=1000)

    def test_without_an_end(self):
        with mock.patch.object(module, "LARGEST_UNANNOUNCED", 10**6):
            self.server.headers["/file.bin"] = {"Content-Length": None}
            self.assert_final("sends more than 1000000 bytes", ["endless"])

    def test_hardly_anything(self):
        with self.assertRaisesRegex(ConnectionError, r"only \d+ bytes came in the last"):
            self.download(["drip"], tries=1, timeout=0.3)

    def test_compressed_although_it_was_not_asked_for(self):
        self.server.headers["/file.bin"] = {"Content-Encoding": "gzip"}
        self.assert_final(r"sends the file compressed \(gzip\)")

    def test_a_redirect_with_a_body_without_an_end(self):
        self.server.files["/from"] = b""
        self.server.headers["/from"] = {"Location": self.url, "Content-Length": str(10**12)}
        self.server.moods = ["redirect"]
        download(f"{self.server.url}/from", self.path, SHA256, timeout=0.5)
        self.assertEqual(self.path.read_bytes(), BODY)

    def test_redirects_in_a_circle(self):
        self.server.headers["/file.bin"] = {"Location": "/file.bin"}
        self.assert_final("redirects more than 10 times", ["redirect"] * 20)

    def test_the_token_stays_with_the_server_that_was_asked(self):
        other = self.enterContext(Server({"/file.bin": BODY}))
        self.server.files["/from"] = b""
        self.server.headers["/from"] = {"Location": f"{other.url}/file.bin"}
        self.server.moods = ["redirect"]
        download(f"{self.server.url}/from", self.path, headers={"Authorization": "Bearer secret"})
        self.assertIn("Authorization", self.server.seen[0][1])
        self.assertNotIn("Authorization", other.seen[0][1])

    def test_a_mirror_does_not_choose_the_checksum(self):
        other = self.enterContext(Server({"/file.bin": b"something else"}))
        wrong = hashlib.sha256(b"something else").hexdigest()
        other.headers["/file.bin"] = {"X-Linked-Etag": f'"{wrong}"'}
        self.server.files["/from"] = b""
        self.server.headers["/from"] = {
            "Location": f"{other.url}/file.bin",
            "X-Linked-Etag": f'"{SHA256}"',
        }
        self.server.moods = ["redirect"]
        with self.assertRaisesRegex(ValueError, f"not {SHA256}"):
            download(f"{self.server.url}/from", self.path)


@mock.patch("time.sleep", mock.Mock())  # between tries
class TestVersions(TempDirTestCase):
    """A file that changes on the server while it is downloaded."""

    def setUp(self):
        super().setUp()
        home = {"MINGPT_HOME": str(self.folder / "home")}
        self.enterContext(mock.patch.dict(os.environ, home))
        self.path = self.folder / "files" / "file.bin"
        self.server = self.enterContext(Server({"/file.bin": BODY}))
        self.url = f"{self.server.url}/file.bin"
        self.server.headers["/file.bin"] = {"ETag": '"1"'}
        self.server.moods = ["cut"]
        with self.assertRaises(ConnectionError):
            download(self.url, self.path, tries=1)

    def test_the_same_version_is_continued(self):
        download(self.url, self.path)
        self.assertEqual(self.path.read_bytes(), BODY)
        _, headers = self.server.seen[-1]
        self.assertEqual(headers["If-Range"], '"1"')
        self.assertEqual(headers["Range"], f"bytes={len(BODY) // 2}-")
        self.assertEqual(os.listdir(self.path.parent), ["file.bin"])

    def test_another_version_is_not_joined_to_it(self):
        new = BODY[::-1]
        self.server.files["/file.bin"] = new
        self.server.headers["/file.bin"] = {"ETag": '"2"'}
        download(self.url, self.path)  # the server takes no notice of If-Range
        self.assertEqual(self.path.read_bytes(), new)


class TestManyProcesses(TempDirTestCase):
    def test_one_downloads_and_the_others_wait(self):
        server = self.enterContext(Server({"/file.bin": BODY}))
        server.moods = ["slow"] * 20
        script = (
            "import sys, time; from mingpt.download import download; "
            "time.sleep(float(sys.argv[3])); download(sys.argv[1], sys.argv[2])"
        )
        environment = {**os.environ, "MINGPT_HOME": str(self.folder / "home")}
        for attempt in range(3):
            path = self.folder / f"{attempt}" / "file.bin"
            url = f"{server.url}/file.bin"
            processes = [
                subprocess.Popen(
                    [sys.executable, "-c", script, url, str(path), str(0.1 * i)],
                    cwd=ROOT,
                    env=environment,
                )
                for i in range(4)
            ]
            self.assertEqual([process.wait() for process in processes], [0] * 4)
            self.assertEqual(path.read_bytes(), BODY)
            self.assertEqual(os.listdir(path.parent), ["file.bin"])
        self.assertEqual(len(server.seen), 3)

    def test_a_process_that_is_killed_holds_up_nobody(self):
        server = self.enterContext(Server({"/file.bin": BODY}))
        server.moods = ["stall"]
        path = self.folder / "files" / "file.bin"
        environment = {**os.environ, "MINGPT_HOME": str(self.folder / "home")}
        script = "import sys; from mingpt.download import download; download(*sys.argv[1:])"
        url = f"{server.url}/file.bin"
        process = subprocess.Popen(
            [sys.executable, "-c", script, url, str(path)], cwd=ROOT, env=environment
        )
        while not server.seen:
            self.assertIsNone(process.poll())
        process.kill()
        process.wait()
        with mock.patch.dict(os.environ, environment):
            self.assertEqual(download(url, path).read_bytes(), BODY)
