"""Downloads, from a server that misbehaves, and where they are kept."""

import errno
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
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

    def test_a_server_that_sends_chunks(self):
        self.assert_arrives(["chunked"], [None])

    def test_a_chunk_that_ends_too_early(self):
        self.assert_arrives(["cut chunk"], [None, f"bytes={len(BODY) // 2 - 1}-"])

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

    def test_a_disk_that_is_full(self):
        full = OSError(errno.ENOSPC, "No space left on device")
        with (
            mock.patch("os.fsync", side_effect=full),
            self.assertRaisesRegex(OSError, "No space left on device: .*file.bin.part"),
        ):
            self.download()
        self.assertEqual(self.download().read_bytes(), BODY)

    def test_a_slow_disk_is_not_the_servers_fault(self):
        def sync(fileno):
            threading.Event().wait(0.6)

        with mock.patch("os.fsync", sync):
            self.download(tries=1, timeout=0.1)

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

    def test_also_a_refusal_says_what_to_do_instead(self):
        self.assert_final("may you read it\\?. Or walk$", moods=[403], otherwise="Or walk")

    def test_a_retry_is_a_warning(self):
        with self.assertLogs("mingpt", "WARNING"):
            self.download([503])

    def test_arguments_out_of_range(self):
        for name, value in (
            ("tries", 0),
            ("tries", 1.5),
            ("timeout", 0),
            ("timeout", -1),
            ("timeout", float("nan")),
            ("deadline", 0),
            ("size", -1),
            ("size", 1.5),
            ("sha256", "abc"),
            ("sha256", "g" * 64),
            ("sha256", 3),
        ):
            with self.assertRaisesRegex(ValueError, f"{name}={value!r}"):
                self.download(**{name: value})

    def test_what_is_no_address(self):
        for url in ("nonsense", "file:///etc/passwd", "http://", "", None):
            with self.subTest(url=url), self.assertRaisesRegex(ValueError, "must begin with http"):
                download(url, self.path)

    def test_an_address_that_cannot_be_one(self):
        with self.assertRaisesRegex(ValueError, "leads to no web address"):
            download("http://[::1/file", self.path)

    def test_a_folder_in_the_place_of_the_file(self):
        with self.assertRaisesRegex(ValueError, "is a folder; expected the name of a file"):
            download(self.url, self.folder)

    def test_a_password_in_the_address_is_not_shown(self):
        url = self.server.url.replace("//", "//me:secret@")
        with self.assertRaisesRegex(ValueError, "http://127.0.0.1:.* Not Found") as raised:
            download(f"{url}/nothing", self.path)
        self.assertNotIn("secret", str(raised.exception))


class TestHeaders(DownloadTestCase):
    """What the caller adds to the request, a token for instance."""

    def test_blanks_at_the_ends_are_stripped(self):
        self.download(headers={"Authorization": " Bearer secret\n"})
        _, headers = self.server.seen[0]
        self.assertEqual(headers["Authorization"], "Bearer secret")

    def test_what_cannot_be_sent_is_refused_and_not_shown(self):
        for value in ("Bearer sec\nret", "Bearer sec\rret", "secr\u00e9t", b"secret", None):
            with (
                self.subTest(value=value),
                self.assertRaisesRegex(ValueError, "'Authorization' must be") as raised,
            ):
                self.download(headers={"Authorization": value})
            self.assertNotIn("sec", str(raised.exception))


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

    def test_compressed_on_the_way(self):
        self.server.headers["/file.bin"] = {"Transfer-Encoding": "gzip, chunked"}
        self.assert_final(r"sends the file compressed \(gzip, chunked\)")

    def test_more_than_the_part_lacks(self):
        self.part.parent.mkdir()
        self.part.write_bytes(BODY[:500])
        self.server.headers["/file.bin"] = {"ETag": '"1"'}
        self.part.with_name("file.bin.version").write_text('"1"')
        self.assert_final("sends more than 1000 bytes", ["endless", "endless"], size=1000)

    def test_a_size_of_too_many_digits(self):
        self.server.headers["/file.bin"] = {"X-Linked-Size": "9" * 5000}
        self.assertEqual(self.download().read_bytes(), BODY)

    def test_a_deadline(self):
        self.server.files["/file.bin"] = BODY[:100]
        message = r"failed once because it is not complete after 1 s, its deadline"
        with self.assertRaisesRegex(ConnectionError, message):
            self.download(["drip"], timeout=30, deadline=0.6)

    def test_the_default_deadline_grows_with_what_arrives(self):
        clock = module.Clock()
        clock.begin()
        self.assertAlmostEqual(clock.left(), 600, delta=1)
        clock.bytes += 10**7
        self.assertAlmostEqual(clock.left(), 1600, delta=1)

    def test_headers_that_drip(self):
        with self.assertRaisesRegex(ConnectionError, "because the server does not answer"):
            self.download(["drip headers"], tries=1, timeout=0.1)

    def test_an_answer_that_never_begins(self):
        with self.assertRaisesRegex(ConnectionError, "because the server does not answer"):
            self.download(["not yet"], tries=1, timeout=0.1)

    def test_a_chunk_whose_length_drips(self):
        with self.assertRaisesRegex(ConnectionError, "because the server has fallen silent"):
            self.download(["drip chunk"], tries=1, timeout=0.3)

    def test_trailers_without_an_end(self):
        with self.assertRaisesRegex(ConnectionError, "because the server has fallen silent"):
            self.download(["trailers"], tries=1, timeout=0.3)

    def test_a_redirect_with_a_body_without_an_end(self):
        self.server.files["/from"] = b""
        self.server.headers["/from"] = {"Location": self.url, "Content-Length": str(10**12)}
        self.server.moods = ["endless redirect"]
        download(f"{self.server.url}/from", self.path, SHA256, timeout=0.5)
        self.assertEqual(self.path.read_bytes(), BODY)
        self.assertLess(self.server.endless_bytes, 2**26)  # what the system buffers

    def test_a_redirect_with_a_body_that_drips(self):
        self.server.files["/from"] = BODY
        self.server.headers["/from"] = {"Location": self.url}
        self.server.moods = ["dripping redirect"]
        download(f"{self.server.url}/from", self.path, SHA256, tries=1, timeout=0.5)
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

    def test_the_hub_may_redirect_to_itself_first(self):
        """As it does for a model that was renamed: then its second answer has the checksum."""
        other = self.enterContext(Server({"/file.bin": b"something else"}))
        self.server.files.update({"/old": b"", "/new": b""})
        self.server.headers["/old"] = {"Location": "/new"}
        self.server.headers["/new"] = {
            "Location": f"{other.url}/file.bin",
            "X-Linked-Etag": f'"{SHA256}"',
        }
        self.server.moods = ["redirect", "redirect"]
        with self.assertRaisesRegex(ValueError, f"not {SHA256}"):
            download(f"{self.server.url}/old", self.path)

    def test_a_redirect_to_what_is_no_address(self):
        for target in ("http://[", "ftp://example.org/file", "file:///etc/passwd", "http://\xff"):
            with self.subTest(target=target):
                self.server.headers["/file.bin"] = {"Location": target}
                self.assert_final("no (web )?address", ["redirect"])

    def test_the_token_is_not_sent_where_others_could_listen(self):
        same_server = module.same_server
        self.assertTrue(same_server("https://hub.org/a", "https://hub.org:443/b"))
        self.assertTrue(same_server("http://hub.org/a", "https://hub.org/b"))
        self.assertFalse(same_server("https://hub.org/a", "http://hub.org/b"))
        self.assertFalse(same_server("https://hub.org/a", "https://hub.org:444/a"))
        self.assertFalse(same_server("https://hub.org/a", "https://hub.org.example/a"))


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

    def change(self):
        """Put another version of the file on the server. Returns it."""
        self.server.files["/file.bin"] = BODY[::-1]
        self.server.headers["/file.bin"] = {"ETag": '"2"'}
        return BODY[::-1]

    def test_another_version_is_not_joined_to_it(self):
        new = self.change()
        self.assertEqual(download(self.url, self.path, tries=1).read_bytes(), new)
        self.assertEqual(len(self.server.seen), 2)
        self.assertEqual(os.listdir(self.path.parent), ["file.bin"])

    def test_nor_where_the_server_takes_no_notice_of_if_range(self):
        new = self.change()
        self.server.moods = ["old range"]
        self.assertEqual(download(self.url, self.path, tries=1).read_bytes(), new)
        self.assertEqual(os.listdir(self.path.parent), ["file.bin"])

    def test_another_version_that_breaks_off_is_continued_as_such(self):
        new = self.change()
        self.server.moods = ["cut", None]
        self.assertEqual(download(self.url, self.path).read_bytes(), new)
        _, headers = self.server.seen[-1]
        self.assertEqual(headers["If-Range"], '"2"')

    def test_a_date_stands_in_for_an_etag(self):
        self.path.with_name("file.bin.part").unlink()
        date = "Wed, 21 Oct 2015 07:28:00 GMT"
        self.server.headers["/file.bin"] = {"ETag": 'W/"weak"', "Last-Modified": date}
        self.server.moods = ["cut", "old range"]
        self.assertEqual(download(self.url, self.path).read_bytes(), BODY)
        _, headers = self.server.seen[-1]
        self.assertEqual(headers["If-Range"], date)

    def test_a_part_without_a_version_or_a_checksum_is_not_trusted(self):
        self.path.with_name("file.bin.version").unlink()
        self.path.with_name("file.bin.part").write_bytes(b"x" * 100)
        self.assertEqual(download(self.url, self.path, tries=1).read_bytes(), BODY)

    def test_an_old_part_is_continued_where_a_checksum_tells_that_it_fits(self):
        self.path.with_name("file.bin.version").unlink()
        download(self.url, self.path, SHA256)
        _, headers = self.server.seen[-1]
        self.assertEqual(headers["Range"], f"bytes={len(BODY) // 2}-")
        self.assertEqual(len(self.server.seen), 2)

    def test_a_damaged_version(self):
        self.path.with_name("file.bin.version").write_bytes(b"\xff\n\0")
        self.assertEqual(download(self.url, self.path, tries=1).read_bytes(), BODY)

    def test_a_rest_of_unknown_size_could_be_cut(self):
        self.server.moods = ["size unknown"]
        self.assertEqual(download(self.url, self.path, tries=1).read_bytes(), BODY)
        _, headers = self.server.seen[-1]
        self.assertNotIn("Range", headers)


class TestManyProcesses(TempDirTestCase):
    """Real processes that want the same file at about the same time."""

    SCRIPT = """
import random, sys, time
from mingpt.download import download

url, folder, rounds, seed, start = sys.argv[1:]
pauses = random.Random(int(seed))
for i in range(int(rounds)):
    # A round each second: the four processes begin within 0.6 s.
    time.sleep(max(0, float(start) + i + pauses.uniform(0, 0.6) - time.time()))
    download(f"{url}/{i}", f"{folder}/{i}/file.bin", timeout=10)
"""

    def setUp(self):
        super().setUp()
        self.server = self.enterContext(Server({}))
        self.environment = {**os.environ, "MINGPT_HOME": str(self.folder / "home")}

    def start(self, rounds, seed, start=0.0):
        arguments = (self.server.url, self.folder, rounds, seed, start)
        process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, *map(str, arguments)],
            cwd=ROOT,
            env=self.environment,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)  # before that, in case the test fails
        return process

    def test_one_downloads_and_the_others_wait(self):
        rounds = 10
        latency = random.Random(0)
        bodies = [latency.randbytes(1_500_000) for _ in range(rounds)]
        self.server.files = {f"/{i}": body for i, body in enumerate(bodies)}
        self.server.moods = [latency.uniform(0.02, 0.3) for _ in range(4 * rounds)]
        start = time.time() + 1
        processes = [self.start(rounds, seed, start) for seed in range(4)]
        self.assertEqual([process.wait() for process in processes], [0] * 4)
        for i, body in enumerate(bodies):
            with self.subTest(round=i):
                folder = self.folder / str(i)
                self.assertEqual((folder / "file.bin").read_bytes(), body)
                self.assertEqual(os.listdir(folder), ["file.bin"])
        self.assertEqual(len(self.server.seen), rounds)  # each body was sent once

    def test_a_process_that_is_killed_holds_up_nobody(self):
        self.server.files = {"/0": BODY}
        self.server.moods = ["stall"]
        process = self.start(rounds=1, seed=0)
        while not self.server.seen:
            self.assertIsNone(process.poll())
            time.sleep(0.01)
        process.kill()
        process.wait()
        path = self.folder / "0" / "file.bin"
        with mock.patch.dict(os.environ, self.environment):
            self.assertEqual(download(f"{self.server.url}/0", path).read_bytes(), BODY)

    def test_who_waits_takes_over_from_one_that_is_killed(self):
        self.server.files = {"/0": BODY}
        self.server.moods = ["drip"]
        first = self.start(rounds=1, seed=0)
        while not self.server.seen:
            self.assertIsNone(first.poll())
            time.sleep(0.01)
        second = self.start(rounds=1, seed=1)
        time.sleep(1)
        self.assertEqual(len(self.server.seen), 1)
        self.assertIsNone(second.poll())
        first.kill()
        first.wait()
        self.assertEqual(second.wait(timeout=20), 0)
        self.assertEqual((self.folder / "0" / "file.bin").read_bytes(), BODY)

    def test_waiting_ends_at_the_deadline(self):
        self.server.files = {"/0": BODY}
        self.server.moods = ["drip"]
        process = self.start(rounds=1, seed=0)
        while not self.server.seen:
            self.assertIsNone(process.poll())
            time.sleep(0.01)
        path = self.folder / "0" / "file.bin"
        with (
            mock.patch.dict(os.environ, self.environment),
            self.assertRaisesRegex(ConnectionError, "another process still downloads"),
        ):
            download(f"{self.server.url}/0", path, deadline=0.3)
        process.kill()
        process.wait()
