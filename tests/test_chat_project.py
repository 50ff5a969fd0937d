"""projects/chat: the labels, their page and its server."""

import contextlib
import copy
import functools
import http.client
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import torch

from mingpt import plots
from mingpt.bpe import BPETokenizer
from mingpt.chat import Chat
from mingpt.datasets import read_jsonl
from mingpt.model import GPT
from mingpt.rlhf import ALGORITHMS, choose
from mingpt.run_folder import read_metrics
from tests import tiny_chat
from tests.common import NO_POINTS, ROOT, TempDirTestCase, printed

sys.path.insert(0, str(ROOT / "projects" / "chat"))
import answers
import best_of_n
import compare
import desk
import exchange
import label
import labellers
import lessons
import outcome
import server
import talk
import teach
from judge import Judge
from store import Answer, Label, Pair, Refused, Store, StoreError

PROJECT = ROOT / "projects" / "chat"

# A desk whose pairs are made at once, without a model: the server of the tests. Its arguments are
# the project's folder, that of the labels, and whether the person may write.
DESK = """
import os, sys, threading
# It ends with the tests, whatever happens to them: then its standard input is closed.
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
sys.path.insert(0, sys.argv[1])
import desk
from store import Answer, Pair, Store

store = Store(sys.argv[2] + "/labels.db")
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "</p></article><iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "${window.hacked = 1} {{ window.hacked = 1 }} &lt;b&gt; \\u202e \\u0000 \\ufffd",
]

def make_pair(typed, id):
    n = store.count_pairs()
    return Pair(
        prompt=typed or f"<script>window.hacked = 1</script> question {n}",
        messages=[{"role": "user", "content": "?"}],
        left=Answer(f"left {n} {HOSTILE[n % len(HOSTILE)]}", [1, 2], True, "0" * 64),
        right=Answer(f"right {n}", [3], False, "0" * 64),
        sampling={"temperature": 0.7},
        typed=id,
    )

desk.run_desk(
    store,
    make_pair,
    who="<script>window.hacked = 1</script>",
    goal=200,
    open_browser=False,
    may_write=sys.argv[3] == "True",
)
"""


def a_pair(n=0, **options):
    """A pair of answers, which differ from those of other numbers."""
    return Pair(
        prompt=f"question {n}",
        messages=[{"role": "user", "content": f"question {n}?"}],
        left=Answer(f"left {n}", [1, 2, 3], True, "a" * 64),
        right=Answer(f"right {n}", [4], False, "a" * 64),
        sampling={"temperature": 0.7, "seed": n},
        **options,
    )


def key_id(n):
    """An id such as the page makes."""
    return f"{n:032x}"


class DeskProcess:
    """`with DeskProcess(folder) as desk`: the server as a process, which a test may kill."""

    def __init__(self, folder, may_write=True, command=None):
        self.folder = Path(folder)
        self.command = command or ["-c", DESK, PROJECT, self.folder, str(may_write)]
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *args):
        self.kill()

    def start(self):
        """Start it, and wait until it listens."""
        self.process = subprocess.Popen(
            [sys.executable, *self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        line = self.process.stdout.readline()
        self.address = line.split()[-1]
        self.listening_on = int(self.address.partition("/#")[0].rpartition(":")[2])
        self.token = self.address.partition("#")[2]

    def kill(self):
        """kill -9."""
        self.process.kill()
        self.forget()

    def forget(self):
        """Wait for the end of a process that was killed."""
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Client:
    """Talks to the server as the page does; a test may replace each header."""

    def __init__(self, port, token):
        self.port = port
        self.token = token
        self.cookie = None

    def request(self, method, path, body=None, headers=None, raw=None):
        """(status, headers, JSON or text). A header whose value is None is left out."""
        sent = {"Host": f"127.0.0.1:{self.port}"}
        if method == "POST":
            sent["Origin"] = f"http://127.0.0.1:{self.port}"
            sent["Content-Type"] = "application/json"
        if self.cookie:
            sent["Cookie"] = self.cookie
        sent |= headers or {}
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            if method == "POST":
                connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        return response.status, response.headers, text

    def log_in(self):
        status, headers, _ = self.request("POST", "/session", {"token": self.token})
        self.cookie = (headers.get("Set-Cookie") or "").partition(";")[0]
        return status, headers

    def pair(self):
        """The pair on the page, as soon as there is one."""
        for _ in range(200):
            status, _, state = self.request("GET", "/state")
            assert status == 200, state
            if state["pair"]:
                return state["pair"]
            time.sleep(0.01)
        raise AssertionError("no pair was made")

    def press(self, n, pair, choice, **more):
        return self.request(
            "POST", "/keys", {"id": key_id(n), "pair": pair, "choice": choice, **more}
        )


# --------------------------------------------------------------------------------------------------
# The database


class StoreTests(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.store = Store(self.folder / "out" / "labels.db")
        self.addCleanup(self.store.close)

    def decided(self):
        return [(label.pair.id, label.choice) for label in self.store.labels()]

    def test_a_label_keeps_all_that_is_known(self):
        self.store.add_pairs([a_pair(7)])
        self.store.press(key_id(1), 1, "right", who="Ada")
        [label] = Store(self.store.path).labels()
        self.assertEqual((label.id, label.choice, label.who), (key_id(1), "right", "Ada"))
        expected = a_pair(7)
        expected.id = 1
        self.assertEqual(label.pair, expected)
        self.assertEqual(label.comparisons(), [(expected.right, expected.left)])

    def test_the_same_key_twice_counts_once(self):
        self.store.add_pairs([a_pair(0)])
        for _ in range(3):
            self.store.press(key_id(1), 1, "left", who="me")
        self.assertEqual(self.decided(), [(1, "left")])

    def test_an_id_of_another_key_is_refused(self):
        self.store.add_pairs([a_pair(0), a_pair(1)])
        self.store.press(key_id(1), 1, "left", who="me")
        for pair, choice in ((1, "right"), (2, "left")):
            with self.assertRaisesRegex(Refused, "belongs to another key"):
                self.store.press(key_id(1), pair, choice, who="me")
        self.assertEqual(self.decided(), [(1, "left")])

    def test_a_pair_is_decided_once(self):
        self.store.add_pairs([a_pair(0)])
        self.store.press(key_id(1), 1, "left", who="me")
        with self.assertRaisesRegex(Refused, "answered already, in another window"):
            self.store.press(key_id(2), 1, "right", who="me")
        self.assertEqual(self.decided(), [(1, "left")])

    def test_undo_opens_the_last_pair_again(self):
        self.store.add_pairs([a_pair(0), a_pair(1), a_pair(2)])
        self.store.press(key_id(1), 1, "left", who="me")
        self.store.press(key_id(2), 2, "skip", who="me")
        self.assertEqual(self.store.press(key_id(3), None, "undo", who="me"), 2)
        self.assertEqual(self.store.open_pairs()[0].id, 2)
        self.assertEqual(self.decided(), [(1, "left")])
        self.store.press(key_id(4), 2, "right", who="me")
        self.assertEqual(self.decided(), [(1, "left"), (2, "right")])

    def test_the_same_undo_twice_takes_back_one_key(self):
        self.store.add_pairs([a_pair(0), a_pair(1)])
        self.store.press(key_id(1), 1, "left", who="me")
        self.store.press(key_id(2), 2, "left", who="me")
        for _ in range(3):
            self.store.press(key_id(3), None, "undo", who="me")
        self.assertEqual(self.decided(), [(1, "left")])

    def test_a_key_that_was_undone_does_not_come_back_when_it_is_sent_again(self):
        self.store.add_pairs([a_pair(0)])
        self.store.press(key_id(1), 1, "left", who="me")
        self.store.press(key_id(2), None, "undo", who="me")
        self.store.press(key_id(1), 1, "left", who="me")
        self.assertEqual(self.decided(), [])

    def test_undo_of_nothing_is_refused(self):
        with self.assertRaisesRegex(Refused, "nothing to undo"):
            self.store.press(key_id(1), None, "undo", who="me")

    def test_a_better_answer_is_chosen_over_both(self):
        self.store.add_pairs([a_pair(0)])
        self.store.press(key_id(1), 1, "better", who="me", better="  mine \n")
        [label] = self.store.labels()
        texts = [(chosen.text, rejected.text) for chosen, rejected in label.comparisons()]
        self.assertEqual(texts, [("mine", "left 0"), ("mine", "right 0")])

    def test_alike_and_skip_are_kept_but_are_no_comparisons(self):
        self.store.add_pairs([a_pair(0), a_pair(1)])
        self.store.press(key_id(1), 1, "alike", who="me")
        self.store.press(key_id(2), 2, "skip", who="me")
        self.assertEqual(self.decided(), [(1, "alike"), (2, "skip")])
        self.assertEqual([label.comparisons() for label in self.store.labels()], [[], []])

    def test_keys_that_cannot_be_are_refused(self):
        self.store.add_pairs([a_pair(0)])
        good = {"id": key_id(1), "pair": 1, "choice": "left", "better": None}
        for wrong, message in (
            ({"id": "1"}, "an id must be a string of 8 to 100 characters"),
            ({"id": None}, "an id must be"),
            ({"id": "x" * 101}, "an id must be"),
            ({"pair": 2}, "there is no pair 2"),
            ({"pair": "1"}, "there is no pair '1'"),
            ({"pair": True}, "there is no pair True"),
            ({"pair": None}, "there is no pair None"),
            ({"pair": 2**64}, "there is no pair"),
            ({"pair": -1}, "there is no pair"),
            ({"choice": "both"}, "choice='both' must be one of left, right"),
            ({"choice": ["left"]}, "must be one of"),
            ({"better": "mine"}, "comes without a better answer"),
            ({"choice": "better"}, "the better answer is empty"),
            ({"choice": "better", "better": " \n"}, "the better answer is empty"),
            ({"choice": "better", "better": "x" * 4001}, "4001 characters; 4000 are allowed"),
            ({"choice": "better", "better": "\ud800"}, "half a character"),
        ):
            with self.subTest(wrong), self.assertRaisesRegex(Refused, message):
                self.store.press(**(good | wrong), who="me")
        self.assertEqual(self.decided(), [])

    def test_a_typed_prompt_is_kept_once_and_answered_once(self):
        for _ in range(2):
            self.store.add_prompt(key_id(1), " How are you? ")
        self.assertEqual(self.store.typed_prompt(), (key_id(1), "How are you?"))
        self.store.add_pairs([a_pair(0)])
        self.store.add_pairs([a_pair(1, typed=key_id(1))])
        self.assertIsNone(self.store.typed_prompt())
        self.assertEqual(self.store.open_pairs()[0].typed, key_id(1))
        with self.assertRaises(sqlite3.IntegrityError):
            self.store.add_pairs([a_pair(2), a_pair(3, typed=key_id(1))])
        self.assertEqual(self.store.count_pairs(), 2)

    def test_the_pair_on_the_page_stays_there_while_it_is_open(self):
        self.store.add_pairs([a_pair(0), a_pair(1)])
        self.assertEqual(self.store.open_pairs(keep=2)[0].id, 2)
        self.store.press(key_id(1), 2, "left", who="me")
        self.assertEqual(self.store.open_pairs(keep=2)[0].id, 1)

    @unittest.skipIf(os.name == "nt", "Windows has no file modes")
    def test_only_the_owner_may_read_the_files(self):
        self.store.add_pairs([a_pair(0)])
        for path in self.store.path.parent.iterdir():
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600, path.name)
        self.assertEqual(len(list(self.store.path.parent.iterdir())), 3)  # with -wal and -shm

    def test_every_commit_waits_for_the_disk(self):
        self.assertEqual(self.store.pragma("synchronous"), 2)  # FULL
        self.assertEqual(self.store.rows("PRAGMA journal_mode")[0][0], "wal")

    def test_a_full_disk_is_one_clear_line_and_loses_nothing(self):
        self.store.add_pairs([a_pair(0), a_pair(1)])
        self.store.press(key_id(1), 1, "left", who="me")
        pages = self.store.pragma("page_count")
        self.store.rows(f"PRAGMA max_page_count = {pages}")
        long_text = "x" * 4000
        with self.assertRaisesRegex(StoreError, "labels.db: the disk is full. .*make room"):
            for _ in range(10):
                self.store.press(key_id(2), 2, "better", who="me", better=long_text)
                self.store.press(key_id(3), None, "undo", who="me")
                self.store.add_pairs([a_pair(n) for n in range(50)])
        self.store.rows("PRAGMA max_page_count = 100000")
        self.assertEqual(self.decided()[0], (1, "left"))
        self.store.add_pairs([a_pair(2)])

    def test_a_database_of_another_version_is_refused(self):
        self.store.rows("PRAGMA user_version = 2")
        with self.assertRaisesRegex(ValueError, "by version 2 .* this is version 1: export"):
            Store(self.store.path)

    def test_a_database_of_another_program_is_refused(self):
        path = self.folder / "other.db"
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE t (x)")
        connection.close()
        with self.assertRaisesRegex(ValueError, "other.db is the database of another program"):
            Store(path)

    def test_a_file_that_is_no_database_is_refused(self):
        path = self.folder / "notes.db"
        path.write_text("dear diary " * 100)
        with self.assertRaisesRegex(ValueError, "notes.db is damaged, or no SQLite file"):
            Store(path)
        self.assertIn("dear diary", path.read_text())

    def test_many_threads_and_two_stores_keep_each_key_once(self):
        self.store.add_pairs([a_pair(n) for n in range(40)])
        stores = [self.store, Store(self.store.path)]
        refused = []

        def press_all(number):
            order = random.Random(number).sample(range(40), 40)
            for n in order:
                try:
                    # Two threads each send the same key; the other two race with other ids.
                    key = key_id(100 * (number % 2) + n)
                    stores[number % 2].press(key, n + 1, "left", who=str(number))
                except Refused:
                    refused.append(n)

        threads = [threading.Thread(target=press_all, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(pair for pair, _ in self.decided()), list(range(1, 41)))


@unittest.skipUnless(hasattr(os, "fork"), "needs fork")
class CrashTests(TempDirTestCase):
    """A process is killed before each single statement that it sends to SQLite, in turn."""

    def killed_before_statement(self, number, act):
        """Run act(store) in a process that kills itself there; whether it got that far."""
        child = os.fork()
        if child == 0:
            try:
                database = Store(self.folder / "labels.db")
                left = [number]

                def count(statement):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

                database.connection.set_trace_callback(count)
                act(database)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)

    def campaign(self, act, check, complete):
        """Kill act before each statement, and check what it leaves; how many there are.

        check(store) comes before act is repeated, complete(store) after it.
        """
        number = 0
        while True:
            for path in self.folder.iterdir():
                path.unlink()
            database = Store(self.folder / "labels.db")
            database.add_pairs([a_pair(0), a_pair(1)])
            database.press(key_id(1), 1, "left", who="me")
            database.close()
            killed = self.killed_before_statement(number, act)
            database = Store(self.folder / "labels.db")
            check(database)
            act(database)  # the page sends it again
            complete(database)
            database.close()
            if not killed:
                return number
            number += 1

    def test_a_decision_is_there_as_a_whole_or_not_at_all(self):
        def act(database):
            database.press(key_id(2), 2, "better", who="me", better="mine")

        def check(database):
            decided = [(label.choice, label.better) for label in database.labels()]
            self.assertIn(decided, ([("left", None)], [("left", None), ("better", "mine")]))

        def complete(database):
            self.assertEqual([label.choice for label in database.labels()], ["left", "better"])

        self.assertGreater(self.campaign(act, check, complete), 3)

    def test_an_undo_is_there_as_a_whole_or_not_at_all(self):
        def act(database):
            database.press(key_id(2), None, "undo", who="me")

        def check(database):
            n_undos = database.number("SELECT count(*) FROM keys WHERE choice = 'undo'")
            self.assertEqual(len(database.labels()), 1 - n_undos)

        def complete(database):
            self.assertEqual(database.labels(), [])
            self.assertEqual(database.count_open(), 2)

        self.assertGreater(self.campaign(act, check, complete), 4)

    def test_a_database_is_made_as_a_whole_or_not_at_all(self):
        number = 0
        killed = True
        while killed:
            for path in self.folder.iterdir():
                path.unlink()
            connect = sqlite3.connect

            def connect_and_count(*args, n=number, connect=connect, **options):
                connection = connect(*args, **options)
                left = [n]

                def count(statement):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

                connection.set_trace_callback(count)
                return connection

            child = os.fork()
            if child == 0:
                with mock.patch.object(sqlite3, "connect", connect_and_count):
                    Store(self.folder / "labels.db")
                os._exit(0)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status)
            database = Store(self.folder / "labels.db")
            database.add_pairs([a_pair(0)])
            database.close()
            number += 1
        self.assertGreater(number, 8)


# --------------------------------------------------------------------------------------------------
# The server


class ServerTests(TempDirTestCase):
    @classmethod
    def setUpClass(cls):
        cls.shared = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.desk = cls.enterClassContext(DeskProcess(cls.shared))

    def setUp(self):
        super().setUp()
        self.client = Client(self.desk.listening_on, self.desk.token)

    def refused(self, status, method="GET", path="/state", body=None, **options):
        """Assert that a request gets this status; the message."""
        got, _, answer = self.client.request(method, path, body, **options)
        self.assertEqual(got, status, answer)
        return answer["error"]

    def test_the_page_holds_nothing_that_is_secret(self):
        status, _, page = self.client.request("GET", "/")
        self.assertEqual(status, 200)
        for secret in (self.desk.token, server.cookie_value(self.desk.token), "question 0"):
            self.assertNotIn(secret, page)

    def test_the_page_may_load_nothing_and_be_framed_by_nobody(self):
        _, headers, page = self.client.request("GET", "/")
        policy = dict(
            directive.strip().split(" ", 1)
            for directive in headers["Content-Security-Policy"].split(";")
        )
        self.assertEqual(policy["default-src"], "'none'")
        self.assertEqual(policy["frame-ancestors"], "'none'")
        nonce = policy["script-src"].removeprefix("'nonce-").removesuffix("'")
        self.assertEqual(page.count(f'nonce="{nonce}"'), 2)
        self.assertEqual(page.count("<script"), 1)
        self.assertNotIn("http:", page)
        self.assertNotIn("https:", page)
        self.assertNotIn("innerHTML", page)

    def test_each_page_has_a_nonce_of_its_own(self):
        policies = {
            self.client.request("GET", "/")[1]["Content-Security-Policy"] for _ in range(3)
        }
        self.assertEqual(len(policies), 3)

    def test_the_token_is_swapped_for_a_cookie_that_no_script_and_no_other_site_has(self):
        status, headers = self.client.log_in()
        self.assertEqual(status, 200)
        cookie = headers["Set-Cookie"]
        for attribute in ("HttpOnly", "SameSite=strict", "Path=/"):
            self.assertIn(attribute, cookie)
        self.assertNotIn("Domain", cookie)
        self.assertNotIn(self.desk.token, cookie)
        self.assertEqual(self.client.request("GET", "/state")[0], 200)

    def test_a_wrong_token_gets_no_cookie(self):
        for token in ("", "x" * 43, self.desk.token[:-1], "\u00fc", None, 7):
            with self.subTest(token):
                status, headers, _ = self.client.request("POST", "/session", {"token": token})
                self.assertIn(status, (400, 403))
                self.assertNotIn("Set-Cookie", headers)

    def test_without_the_cookie_there_are_no_data_and_no_keys(self):
        message = "open the address that the terminal shows"
        self.assertIn(message, self.refused(401))
        for path in ("/keys", "/prompts"):
            self.assertIn(message, self.refused(401, "POST", path, {"id": key_id(1)}))

    def test_a_wrong_cookie_is_refused(self):
        self.client.log_in()
        name, _, value = self.client.cookie.partition("=")
        for cookie in (f"{name}=x", f"{name}={self.desk.token}", f"{name}x={value}", "\u00e9"):
            with self.subTest(cookie):
                self.client.cookie = cookie
                self.refused(401)

    def test_another_host_is_refused(self):
        self.client.log_in()
        port = self.desk.listening_on
        for host in ("evil.example", f"evil.example:{port}", f"localhost:{port}", "127.0.0.1", ""):
            with self.subTest(host):
                self.refused(421, headers={"Host": host})
                self.assertEqual(self.client.request("GET", "/", headers={"Host": host})[0], 421)

    def test_another_origin_is_refused(self):
        self.client.log_in()
        port = self.desk.listening_on
        body = {"id": key_id(1), "pair": 1, "choice": "left"}
        for origin in (
            "http://evil.example",
            "null",
            f"https://127.0.0.1:{port}",
            f"http://127.0.0.1:{port + 1}",
            f"http://localhost:{port}",
        ):
            with self.subTest(origin):
                headers = {"Origin": origin}
                self.assertIn("Origin", self.refused(403, headers=headers))
                self.assertIn("Origin", self.refused(403, "POST", "/keys", body, headers=headers))

    def test_a_post_without_an_origin_is_refused(self):
        self.client.log_in()
        message = self.refused(403, "POST", "/keys", {}, headers={"Origin": None})
        self.assertIn("must name its Origin", message)

    def test_a_request_of_another_site_is_refused(self):
        self.client.log_in()
        for site in ("cross-site", "same-site"):
            self.assertIn("another site", self.refused(403, headers={"Sec-Fetch-Site": site}))

    def test_a_form_cannot_change_anything(self):
        self.client.log_in()
        for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data"):
            headers = {"Content-Type": kind}
            message = self.refused(415, "POST", "/keys", {"id": key_id(1)}, headers=headers)
            self.assertIn("must be application/json", message)

    def test_only_posts_change_anything(self):
        self.client.log_in()
        for path in ("/keys", "/prompts", "/session"):
            self.assertEqual(self.client.request("GET", path)[0], 405)

    def test_what_is_no_json_object_is_refused(self):
        self.client.log_in()
        for raw in (b"", b"{", b"[]", b"\xff", b"[" * 20000):
            self.assertIn("JSON object", self.refused(400, "POST", "/keys", raw=raw))

    def test_a_huge_request_is_refused(self):
        self.client.log_in()
        self.refused(413, "POST", "/keys", raw=b'{"id": "' + b"x" * 70_000 + b'"}')

    def test_without_a_token_nobody_gets_in(self):
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        with self.assertRaisesRegex(server.Refusal, "has no token"):
            server.token_of(database)

    def test_an_unknown_path_is_refused(self):
        self.client.log_in()
        for path in ("/labels.db", "/../store.py", "/docs", "//evil.example"):
            self.assertEqual(self.client.request("GET", path)[0], 404)

    def test_every_answer_has_the_protecting_headers(self):
        for path in ("/", "/state", "/nothing"):
            _, headers, _ = self.client.request("GET", path)
            for name, value in server.HEADERS.items():
                self.assertEqual(headers[name], value, path)

    def test_keys_undo_and_typed_prompts_through_the_server(self):
        self.client.log_in()
        first = self.client.pair()
        status, _, state = self.client.press(11, first["id"], "left")
        self.assertEqual(status, 200)
        self.assertNotEqual(state["pair"] and state["pair"]["id"], first["id"])
        status, _, state = self.client.press(12, None, "undo")
        self.assertEqual(state["pair"], first)
        body = {"id": key_id(13), "prompt": "How do you do?"}
        self.assertEqual(self.client.request("POST", "/prompts", body)[0], 200)
        for _ in range(200):
            _, _, state = self.client.request("GET", "/state")
            if state["pair"]["prompt"] == "How do you do?":
                break
            time.sleep(0.01)
        self.assertEqual(state["pair"]["prompt"], "How do you do?")
        status, _, _ = self.client.press(14, state["pair"]["id"], "better", better="Well!")
        self.assertEqual(status, 200)
        status, _, answer = self.client.press(15, state["pair"]["id"], "left")
        self.assertEqual((status, "another window" in answer["error"]), (409, True))

    def test_the_page_is_not_told_which_model_wrote_an_answer(self):
        self.client.log_in()
        self.assertEqual(set(self.client.pair()["left"]), {"text", "ended"})

    def test_the_next_pair_is_made_while_this_one_is_read(self):
        self.client.log_in()
        self.client.pair()
        database = Store(Path(self.shared) / "labels.db")
        self.addCleanup(database.close)
        deadline = time.time() + 5
        while database.count_open() < desk.AHEAD and time.time() < deadline:
            time.sleep(0.01)
        self.assertGreaterEqual(database.count_open(), 2)

    def test_it_listens_on_127_0_0_1_only(self):
        with socket.socket() as other, self.assertRaises(OSError):
            other.settimeout(1)
            other.connect(("127.0.0.2", self.desk.listening_on))

    def test_a_busy_port_is_one_clear_line(self):
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        port = self.desk.listening_on
        with self.assertRaisesRegex(ValueError, f"port {port} .* another terminal. Stop it there"):
            server.listen(database, port)
        self.assertIsNone(database.remembered("port"))


class RestartTests(TempDirTestCase):
    def test_a_restarted_server_keeps_its_port_and_token(self):
        with DeskProcess(self.folder) as process:
            client = Client(process.listening_on, process.token)
            client.log_in()
            pair = client.pair()
            before = process.address
            process.kill()
            process.start()
            self.assertEqual(process.address, before)
            self.assertEqual(client.pair(), pair)  # with the old cookie

    @unittest.skipIf(os.name == "nt", "Windows has no SIGKILL")
    def test_killing_it_at_any_moment_loses_nothing_and_doubles_nothing(self):
        # What the page does: send a key until it is acknowledged. Meanwhile the server is killed
        # and started again, at moments that spread over a few milliseconds around the key.
        random_numbers = random.Random(0)
        expected = {}
        undone = 0
        kills = 0
        with DeskProcess(self.folder) as process:
            client = Client(process.listening_on, process.token)
            client.log_in()
            for n in range(60):
                pair = client.pair()["id"]
                choice = random_numbers.choice(["left", "right", "alike", "better", "skip", "undo"])
                if choice == "undo" and not expected:
                    choice = "left"
                timer = None
                if n % 5 == 4:
                    delay = random_numbers.uniform(0, 0.012)
                    timer = threading.Timer(delay, process.process.kill)
                    timer.start()
                acknowledged = False
                while not acknowledged:
                    more = {"better": f"mine {n}"} if choice == "better" else {}
                    try:
                        number = None if choice == "undo" else pair
                        status, _, answer = client.press(n, number, choice, **more)
                        self.assertEqual(status, 200, answer)
                        acknowledged = True
                    except (OSError, http.client.HTTPException):
                        process.forget()
                        process.start()
                        kills += 1
                if choice == "undo":
                    expected.popitem()
                    undone += 1
                else:
                    expected[key_id(n)] = (pair, choice)
                if timer:
                    timer.join()
                    if process.process.poll() is not None or self.was_killed(process):
                        process.forget()
                        process.start()
                        kills += 1
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        labels = {label.id: (label.pair.id, label.choice) for label in database.labels()}
        self.assertEqual(labels, expected)
        self.assertEqual(database.number("SELECT count(*) FROM keys"), 60)
        self.assertGreaterEqual(kills, 10)
        self.assertGreater(undone, 0)

    def was_killed(self, process):
        """Whether the process ends within a moment: a signal takes a little time."""
        try:
            process.process.wait(0.2)
        except subprocess.TimeoutExpired:
            return False
        return True


class DeskTests(TempDirTestCase):
    def test_a_pair_that_cannot_be_made_is_told_and_tried_again(self):
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        attempts = []

        def make_pair(typed, id):
            attempts.append(typed)
            if len(attempts) == 1:
                raise ValueError("the model has a headache")
            return a_pair(len(attempts))

        maker = desk.PairMaker(database, make_pair)
        with mock.patch.object(desk, "PAUSE", 0.3), self.assertLogs("mingpt.chat", "ERROR"):
            maker.start()
            deadline = time.time() + 5
            while not maker.problem and time.time() < deadline:
                time.sleep(0.005)
            self.assertIn("the model has a headache", maker.problem)
            while database.count_open() < 2 and time.time() < deadline:
                time.sleep(0.005)
        maker.stop()
        self.assertEqual(maker.problem, "")
        self.assertEqual(database.count_open(), 2)

    def test_a_typed_prompt_that_cannot_be_answered_does_not_keep_the_others_waiting(self):
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        database.add_prompt(key_id(1), "much too long")

        def make_pair(typed, id):
            if typed:
                raise ValueError("it leaves no room")
            return a_pair()

        maker = desk.PairMaker(database, make_pair)
        self.assertTrue(maker.make_one())
        self.assertIn("cannot be answered: it leaves no room", maker.notice)
        self.assertIsNone(database.typed_prompt())
        self.assertTrue(maker.make_one())
        self.assertEqual(database.count_open(), 1)

    def test_the_token_is_not_among_the_arguments_of_the_browser(self):
        address = "http://127.0.0.1:1/#secret"
        with mock.patch("webbrowser.open") as browser, desk.opened(address, self.folder):
            [argument] = browser.call_args.args
            self.assertNotIn("secret", argument)
            path = self.folder / "open.html"
            self.assertEqual(argument, path.resolve().as_uri())
            self.assertIn(address, path.read_text())
            if os.name == "posix":
                self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)
        self.assertFalse(path.exists())

    def test_the_lengths_of_what_is_chosen_are_shown(self):
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        self.assertEqual(desk.lengths(database), "")
        pair = a_pair(0)
        pair.left.text = "one two three"
        pair.right.text = "one"
        database.add_pairs([pair])
        database.press(key_id(1), 1, "left", who="me")
        self.assertIn("choose: 3, and in what you reject: 1", desk.lengths(database))


# --------------------------------------------------------------------------------------------------
# Import and export


class ExchangeTests(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.store = Store(self.folder / "labels.db")
        self.addCleanup(self.store.close)
        self.path = self.folder / "labels.jsonl"

    def other_store(self):
        other = Store(self.folder / "other.db")
        self.addCleanup(other.close)
        return other

    def label_three(self):
        self.store.add_pairs([a_pair(n) for n in range(4)])
        self.store.press(key_id(1), 1, "right", who="me")
        self.store.press(key_id(2), 2, "better", who="me", better="mine")
        self.store.press(key_id(3), 3, "alike", who="me")
        self.store.press(key_id(4), 4, "skip", who="me")

    def test_the_export_has_trls_fields(self):
        self.label_three()
        self.assertEqual(exchange.export_labels(self.store, self.path), 3)
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        self.assertEqual(
            {name: value for name, value in rows[0].items() if name != "id"},
            {
                "prompt": [{"role": "user", "content": "question 0?"}],
                "chosen": [{"role": "assistant", "content": "right 0"}],
                "rejected": [{"role": "assistant", "content": "left 0"}],
                "ended": [False, True],
            },
        )
        self.assertEqual([row["chosen"][0]["content"] for row in rows[1:]], ["mine", "mine"])

    def test_what_was_exported_is_imported_once(self):
        self.label_three()
        exchange.export_labels(self.store, self.path)
        other = self.other_store()
        self.assertEqual(exchange.import_labels(other, self.path, "you"), (3, 3))
        self.assertEqual(exchange.import_labels(other, self.path, "you"), (0, 3))
        again = self.folder / "again.jsonl"
        exchange.export_labels(other, again)
        self.assertEqual(again.read_text(), self.path.read_text())

    def test_ones_own_export_brings_nothing_new(self):
        self.label_three()
        exchange.export_labels(self.store, self.path)
        self.assertEqual(exchange.import_labels(self.store, self.path, "me"), (0, 3))

    def test_plain_text_from_elsewhere_is_imported(self):
        row = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
        self.path.write_text(2 * (json.dumps(row) + "\n"))
        self.assertEqual(exchange.import_labels(self.store, self.path, "me"), (2, 2))
        self.assertEqual(exchange.import_labels(self.store, self.path, "me"), (0, 2))
        label = self.store.labels()[0]
        self.assertEqual(label.pair.messages, [{"role": "user", "content": "Hi"}])
        self.assertEqual(label.comparisons(), [(Answer("Hello!"), Answer("No."))])

    def test_undo_leaves_imported_labels(self):
        row = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
        self.path.write_text(json.dumps(row))
        exchange.import_labels(self.store, self.path, "me")
        with self.assertRaisesRegex(Refused, "nothing to undo"):
            self.store.press(key_id(1), None, "undo", who="me")

    def test_a_wrong_row_is_named_and_nothing_is_imported(self):
        good = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
        message = {"role": "user", "content": "Hi"}
        for wrong, expected in (
            ({"prompt": None}, "the prompt must be text, or messages"),
            ({"prompt": []}, "the prompt must be text, or messages"),
            ({"prompt": ["Hi"]}, "is no message"),
            ({"prompt": [message, {"role": "assistant", "content": "?"}]}, "must be the user's"),
            ({"chosen": None}, "chosen must be text"),
            ({"chosen": [message, message]}, "chosen must be text"),
            ({"rejected": 7}, "rejected must be text"),
            ({"chosen": "\ud800"}, "half a character"),
            ({"ended": [True]}, "ended=.* must be two of true and false"),
            ({"ended": [1, 0]}, "must be two of true and false"),
        ):
            self.path.write_text(json.dumps(good) + "\n" + json.dumps(good | wrong) + "\n")
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, f"row 2: .*{expected}"):
                exchange.import_labels(self.store, self.path, "me")
        self.assertEqual(self.store.labels(), [])


# --------------------------------------------------------------------------------------------------
# Pairs of a model, and labellers that are programs


class PromptTests(TempDirTestCase):
    def test_300_prompts_come_with_the_project_and_100_fresh_ones(self):
        prompts = answers.read_prompts("")
        fresh = answers.read_prompts(str(PROJECT / "fresh.txt"))
        questions = [row["question"] for row in read_jsonl(PROJECT / "known.jsonl", "question")]
        self.assertEqual((len(prompts), len(fresh), len(questions)), (300, 100, 30))
        together = prompts + fresh + questions
        self.assertEqual(len(set(together)), len(together))
        self.assertLess(max(map(len, together)), 100)

    def test_each_prompt_comes_once_before_any_comes_again(self):
        prompts = [f"prompt {n}" for n in range(7)]
        order = [answers.prompt_number(prompts, i, seed=1) for i in range(14)]
        self.assertEqual(set(order[:7]), set(prompts))
        self.assertEqual(set(order[7:]), set(prompts))
        self.assertNotEqual(order[:7], order[7:])
        self.assertNotEqual(order[:7], [answers.prompt_number(prompts, i, 2) for i in range(7)])

    def test_comments_blank_lines_and_repeated_prompts_are_left_out(self):
        path = self.folder / "prompts.txt"
        path.write_text("# mine\n\n  Hello? \nHello?\nWhy?\n")
        self.assertEqual(answers.read_prompts(str(path)), ["Hello?", "Why?"])

    def test_a_file_without_prompts_is_refused(self):
        path = self.folder / "prompts.txt"
        path.write_text("# nothing\n")
        with self.assertRaisesRegex(ValueError, "prompts.txt holds no prompts: write one a line"):
            answers.read_prompts(str(path))


class PairTests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.model = answers.ChatModel.load(tiny_chat.write_tiny_chat(folder), "cpu")
        cls.ask = answers.get_ask_config()
        cls.ask.max_new_tokens = 12

    def test_a_pair_knows_how_it_was_sampled(self):
        pair = answers.sample_pair(self.model, self.ask, "Why?", seed=3)
        self.assertEqual(pair.prompt, "Why?")
        question = "Why? Answer in one short sentence."
        self.assertEqual(pair.messages, [{"role": "user", "content": question}])
        self.assertEqual(pair.sampling["temperature"], 0.7)
        self.assertEqual(pair.sampling["seed"], 3)
        for answer in (pair.left, pair.right):
            self.assertEqual(answer.model, self.model.hash)
            written = answer.ids[: -1 if answer.ended else None]
            self.assertEqual(answer.text, self.model.chat.decode(written).strip())
            self.assertEqual(answer.ended, answer.ids[-1] == tiny_chat.END)
            self.assertLessEqual(len(answer.ids), 12)
        self.assertNotEqual(pair.left.text, pair.right.text)

    def test_the_same_seed_gives_the_same_pair(self):
        pairs = [answers.sample_pair(self.model, self.ask, "Why?", seed=3) for _ in range(2)]
        self.assertEqual(*pairs)

    def test_equal_answers_are_sampled_again(self):
        texts = iter([["a", "a"], ["a", "a"], ["a", "b"]])

        def same(ask, prompts, n, seed):
            return [[Answer(text) for text in next(texts)]]

        with mock.patch.object(self.model, "answers", same):
            pair = answers.sample_pair(self.model, self.ask, "Why?", seed=3)
        self.assertEqual((pair.left.text, pair.right.text), ("a", "b"))

    def test_a_system_prompt_stands_before_the_question(self):
        ask = answers.get_ask_config()
        ask.system, ask.request = "Be brief.", ""
        roles = [message["role"] for message in answers.messages_for(ask, "Why?")]
        self.assertEqual(roles, ["system", "user"])

    def test_a_prompt_that_leaves_no_room_is_refused(self):
        with self.assertRaisesRegex(ValueError, "leaves -?[0-9]+ for the answer"):
            self.model.encode(self.ask, "x" * 200)

    def test_the_hash_tells_models_apart(self):
        other = copy.deepcopy(self.model.model)
        self.assertEqual(answers.hash_of(other), self.model.hash)
        with torch.no_grad():
            next(other.parameters())[0, 0] += 1
        self.assertNotEqual(answers.hash_of(other), self.model.hash)


class LabellerTests(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.model = tiny_chat.write_tiny_chat(self.folder / "tiny")
        self.enterContext(mock.patch.object(label, "log_to_console", lambda: None))

    def label(self, work_dir, *options):
        """The labels of a labeller, as what one can compare."""
        fixed = [f"--work_dir={self.folder / work_dir}", f"--model={self.model}", "--device=cpu"]
        label.main([*fixed, "--ask.max_new_tokens=8", *options])
        database = Store(self.folder / work_dir / "labels.db")
        self.addCleanup(database.close)
        return [(row.id, row.choice, row.pair.left.text) for row in database.labels()]

    def test_a_rule_labels_until_there_are_enough(self):
        labels = self.label("a", "--labeller=simple", "--number=20")
        self.assertEqual(sum(choice in ("left", "right") for _, choice, _ in labels), 20)

    def test_the_same_seed_gives_the_same_labels(self):
        options = ["--labeller=simple", "--number=20"]
        labels = self.label("a", *options)
        self.assertEqual(labels, self.label("b", *options))
        other = self.label("c", *options, "--seed=1")
        self.assertNotEqual([row[1:] for row in other], [row[1:] for row in labels])

    def test_a_stopped_labeller_goes_on_to_the_same_labels(self):
        whole = self.label("a", "--labeller=simple", "--number=20")
        self.label("b", "--labeller=simple", "--number=7")
        self.assertEqual(self.label("b", "--labeller=simple", "--number=20"), whole)

    def test_some_answers_are_flipped(self):
        right = self.label("a", "--labeller=simple", "--number=40", "--flip=0")
        flipped = self.label("b", "--labeller=simple", "--number=40")
        n_flipped = sum(a[1] != b[1] for a, b in zip(right, flipped, strict=True))
        self.assertIn(n_flipped, range(1, 12))

    def test_a_rule_that_finds_all_equal_is_given_up(self):
        with (
            mock.patch.object(label, "PATIENCE", 1),
            mock.patch.dict(labellers.RULES, {"short": lambda: lambda answer: 0}),
            self.assertRaisesRegex(ValueError, "the rule short found all of .* choose another"),
        ):
            self.label("a", "--labeller=short")

    def test_options_that_cannot_be_are_refused_before_a_model_is_loaded(self):
        for option, message in (
            ("--labeller=shrt", "--labeller=shrt must be one of short, warm, simple"),
            ("--flip=1.5", "flip=1.5 must be a number in"),
            ("--number=0", "number=0 must be a whole number"),
            ("--port=70000", "port=70000 must be"),
            ("--ask.temperature=0", "temperature=0.0 must be"),
            ("--prompts=nowhere.txt", "nowhere.txt: there is no such file"),
        ):
            with (
                self.subTest(option),
                mock.patch.object(answers.ChatModel, "load", side_effect=AssertionError),
                self.assertRaisesRegex(ValueError, message),
            ):
                label.main([f"--work_dir={self.folder}", option])

    def test_a_prompt_that_is_too_long_is_found_at_once(self):
        prompts = self.folder / "prompts.txt"
        prompts.write_text("Why?\n" + "x" * 300 + "\n")
        with self.assertRaisesRegex(ValueError, "leaves -?[0-9]+ for the answer"):
            self.label("a", "--labeller=simple", f"--prompts={prompts}")

    def test_export_and_import_on_the_command_line(self):
        self.label("a", "--labeller=simple", "--number=5")
        path = self.folder / "labels.jsonl"
        self.label("a", f"--export={path}")
        self.label("b", f"--import={path}")
        again = self.folder / "again.jsonl"
        self.label("b", f"--export={again}")
        self.assertEqual(again.read_text(), path.read_text())
        self.assertEqual(len(path.read_text().splitlines()), 5)


class LabelByHandTests(TempDirTestCase):
    def test_the_script_serves_pairs_of_a_real_model(self):
        model = tiny_chat.write_tiny_chat(self.folder / "tiny")
        command = [PROJECT / "label.py", f"--model={model}", f"--work_dir={self.folder}"]
        options = ["--open=False", "--device=cpu", "--ask.max_new_tokens=8", "--who=Ada"]
        with DeskProcess(self.folder, command=[*command, *options]) as process:
            client = Client(process.listening_on, process.token)
            client.log_in()
            shown = []
            for n in range(3):
                pair = client.pair()
                shown.append(pair["id"])
                self.assertIn(pair["prompt"], answers.read_prompts(""))
                self.assertEqual(client.press(n, pair["id"], "left")[0], 200)
            body = {"id": key_id(9), "prompt": "Who are you?"}
            self.assertEqual(client.request("POST", "/prompts", body)[0], 200)
            process.process.send_signal(signal.SIGTERM)
            process.process.wait(20)
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        labels = database.labels()
        self.assertEqual([label.pair.id for label in labels], shown)
        self.assertEqual({label.who for label in labels}, {"Ada"})
        self.assertTrue(all(label.pair.left.ids and label.pair.left.model for label in labels))


class RuleTests(unittest.TestCase):
    def decide(self, name, left, right):
        pair = a_pair()
        pair.left, pair.right = left, right
        return labellers.decide(labellers.get_rule(name), pair)

    def test_short_prefers_the_end_and_then_fewer_tokens(self):
        ended, cut = Answer("x", [1] * 9, True), Answer("y", [1] * 3, False)
        self.assertEqual(self.decide("short", ended, cut), "left")
        self.assertEqual(self.decide("short", ended, Answer("z", [1] * 3, True)), "right")
        self.assertEqual(self.decide("short", ended, Answer("z", [2] * 9, True)), "skip")

    def test_warm_prefers_the_happier_answer(self):
        self.assertEqual(self.decide("warm", Answer("I love it!"), Answer("I see.")), "left")

    def test_simple_prefers_short_words(self):
        self.assertEqual(self.decide("simple", Answer("incredible"), Answer("a cat")), "right")
        self.assertEqual(self.decide("simple", Answer("..."), Answer("incredible")), "right")


# --------------------------------------------------------------------------------------------------
# talk.py


class TalkTests(TempDirTestCase):
    def setUp(self):
        super().setUp()
        self.model = tiny_chat.write_tiny_chat(self.folder / "tiny", block_size=160)
        self.enterContext(mock.patch.object(talk, "log_to_console", lambda: None))

    def talk(self, lines, *options):
        """(stdout, stderr) of a conversation through a pipe."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "stdin", io.StringIO(lines)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            saved = f"--save={self.folder / 'said.jsonl'}"
            talk.main([f"--model={self.model}", "--max_new_tokens=10", saved, *options])
        return out.getvalue(), err.getvalue()

    def conversation(self, **options):
        config = talk.get_config()
        config.merge_from_dict({"max_new_tokens": 10, **options})
        return talk.Conversation(config, answers.ChatModel.load(self.model, "cpu"))

    def test_a_pipe_gets_the_answers_and_nothing_else(self):
        out, err = self.talk("Hello?\n\nWhy?\n")
        self.assertEqual(out.count("\n"), 2 + out.strip().count("\n") - 1)
        self.assertNotIn("help", out + err)
        self.assertEqual(self.talk("Hello?\n\nWhy?\n")[0], out)

    def test_the_streamed_answer_is_what_generate_gives(self):
        conversation = self.conversation(temperature=0.0, top_p=None)
        conversation.ask("Hello?")
        ids, _ = conversation.make_room()
        text = "".join(conversation.answer(ids))
        chat = conversation.chat
        expected = conversation.model.generate(
            torch.tensor([ids]), 10, temperature=0, stop_token=list(chat.stop_tokens)
        )[0, len(ids) :].tolist()
        decoded = chat.decode([i for i in expected if i not in chat.stop_tokens])
        self.assertEqual(text, decoded)
        self.assertEqual(conversation.messages[-1]["content"], decoded.strip())

    def test_half_a_character_is_never_shown(self):
        conversation = self.conversation()
        conversation.ask("Hello?")
        written = [*"a\u00e9\U0001f600.".encode(), tiny_chat.END]
        columns = [torch.tensor([[token]]) for token in written]
        with mock.patch.object(conversation.model, "stream", lambda *args, **kwargs: iter(columns)):
            pieces = list(conversation.answer([5]))
        self.assertEqual("".join(pieces), "a\u00e9\U0001f600.")
        self.assertNotIn(talk.UNFINISHED, "".join(pieces))
        self.assertTrue(conversation.ended)

    def test_what_a_terminal_obeys_is_not_passed_on(self):
        self.assertEqual(talk.printable("a\x1b[2J\x07\n\tb\x9b"), "a\ufffd[2J\ufffd\n\tb\ufffd")

    def test_a_long_conversation_drops_its_oldest_turns_and_says_so(self):
        question = "x" * 40 + "\n"
        _, err = self.talk(4 * question)
        self.assertIn("longer than the model's 160 tokens: it has forgotten the oldest 2", err)
        conversation = self.conversation(system="Be kind.")
        for _ in range(4):
            conversation.ask(question)
            ids, _ = conversation.make_room()
            self.assertLessEqual(len(ids) + 10, 160)
            list(conversation.answer(ids))
        roles = [message["role"] for message in conversation.visible()]
        self.assertEqual(roles[:2], ["system", "user"])
        self.assertEqual(len(conversation.messages), 8)

    def test_a_question_that_is_too_long_is_refused_and_the_conversation_goes_on(self):
        out, err = self.talk("Hello?\n" + "x" * 200 + "\nWhy?\n")
        self.assertRegex(err, "error: this has 2[0-9]+ tokens, and there is room for 150")
        self.assertEqual(out, self.talk("Hello?\nWhy?\n")[0])

    def test_ctrl_c_stops_an_answer_and_keeps_what_was_written(self):
        conversation = self.conversation()
        conversation.ask("Hello?")
        token = torch.tensor([[ord("a")]])

        def stream(*args, **kwargs):
            yield token
            yield token
            raise KeyboardInterrupt

        terminal = talk.Terminal(conversation.config, conversation)
        with mock.patch.object(conversation.model, "stream", stream):
            shown = printed(terminal.show_answer)
        self.assertEqual(shown, "aa ...\n")
        answer = {"role": "assistant", "content": "aa"}
        self.assertEqual(conversation.messages[-1], answer)

    def test_retry_writes_another_answer_to_the_same_question(self):
        out, _ = self.talk("Hello?\n/retry\n/save\n")
        [row] = read_jsonl(self.folder / "said.jsonl")
        self.assertEqual([message["role"] for message in row["messages"]], ["user", "assistant"])
        said = talk.printable(row["messages"][1]["content"])
        self.assertTrue(out.rstrip().endswith(said), (out, said))

    def test_reset_forgets_and_system_stays(self):
        self.talk("/system Be kind.\nHello?\n/reset\nWhy?\n/save\n")
        [row] = read_jsonl(self.folder / "said.jsonl")
        self.assertEqual(
            [message["content"] for message in row["messages"][:2]], ["Be kind.", "Why?"]
        )

    def test_commands_that_cannot_be(self):
        _, err = self.talk("/retry\n/save\n/resett\n")
        self.assertIn("nothing has been asked yet", err)
        self.assertIn("nothing has been said yet", err)
        self.assertIn("there is no command /resett: choose from /reset, /system", err)

    def test_a_file_that_cannot_be_written_is_an_error_of_one_line(self):
        _, err = self.talk(f"Hello?\n/save {self.folder}\n")
        self.assertIn("error: ", err)
        self.assertIn("cannot be written", err)

    def test_a_template_that_was_tampered_with_is_one_clear_line(self):
        template = Path(self.model) / "chat_template.jinja"
        for tampered in ("{{ messages.__class__.__mro__ }}", "{% for", "{{ 1 / 0 }}"):
            template.write_text(tampered)
            out, err = self.talk("Hello?\n")
            self.assertEqual(out, "")
            self.assertRegex(err, r"\Aerror: the chat template of [^\n]+\n\Z")

    def test_through_a_real_pipe(self):
        result = subprocess.run(
            [sys.executable, PROJECT / "talk.py", f"--model={self.model}", "--max_new_tokens=5"],
            input=b"What is the capital of France?\n\xff\xfe\n",
            capture_output=True,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertGreaterEqual(result.stdout.count(b"\n"), 2)


# --------------------------------------------------------------------------------------------------
# teach.py and compare.py

SMALL = [
    "--system.seed=1",
    "--ask.max_new_tokens=8",
    "--data.compared_with=16",
    "--reward.max_iters=40",
    "--rl.max_iters=2",
    "--rl.batch_size=8",
    "--rl.minibatch_size=4",
    "--rl.micro_batch_size=4",
    "--rl.learning_rate=1e-2",
    "--rl.checkpoint_every=1",
    "--dpo.epochs=2",
    "--dpo.learning_rate=1e-2",
]


def masks_of(samples):
    return samples.idx, samples.attention_mask, samples.completion_mask


class TeachTests(TempDirTestCase):
    @classmethod
    def setUpClass(cls):
        cls.shared = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.model = tiny_chat.write_tiny_chat(cls.shared / "tiny")
        cls.enterClassContext(mock.patch.object(label, "log_to_console", lambda: None))
        cls.enterClassContext(mock.patch.object(teach, "log_to_console", lambda: None))
        cls.enterClassContext(mock.patch.object(compare, "log_to_console", lambda: None))
        label.main([
            f"--work_dir={cls.shared}",
            f"--model={cls.model}",
            "--device=cpu",
            "--ask.max_new_tokens=8",
            "--labeller=simple",
            "--number=60",
        ])
        cls.labels = cls.shared / "labels.db"
        cls.ppo = cls.shared / "ppo"
        cls.prompts = cls.shared / "fresh.txt"
        cls.prompts.write_text("".join(f"Why {n}?\n" for n in range(24)))
        cls.console = printed(cls.teach, cls.ppo, "--merge")

    @classmethod
    def teach(cls, work_dir, *options):
        with mock.patch.object(plots.logger, "warning") as warning:
            teach.main([
                f"--labels={cls.labels}",
                f"--model.name={cls.model}",
                "--rl.device=cpu",
                f"--system.work_dir={work_dir}",
                f"--report.prompts={cls.prompts}",
                *SMALL,
                *options,
            ])
        # Every curve that a plot draws has points in the metrics of the run.
        warnings = [call.args for call in warning.call_args_list if NO_POINTS in call.args[0]]
        if warnings:
            raise AssertionError(warnings)

    def summary(self, folder):
        return json.loads((folder / "summary.json").read_text())

    def test_the_report_of_ppo_is_complete(self):
        summary = self.summary(self.ppo)
        for name in ("reward", "length", "ended", "known"):
            for when in ("before", "after"):
                self.assertIsInstance(summary[f"{name}_{when}"], (int, float))
        self.assertGreater(summary["kl"], 0)
        self.assertLessEqual(summary["held_out_accuracy"]["low"], 1)
        for name in ("samples.md", "calibration.png", "losses.png", "rl.png", "reward_and_kl.png"):
            self.assertTrue((self.ppo / name).exists(), name)
        table = (self.ppo / "samples.md").read_text(encoding="utf-8").splitlines()
        self.assertEqual(len(table), 2 + outcome.SHOWN)
        self.assertIn("have learned from four fifths of the labels agree with", self.console)
        self.assertEqual(summary["held_out_accuracy"]["n"], 60)  # every label is tested once

    def test_the_result_is_a_small_adapter_that_knows_its_base(self):
        folder = self.ppo / "rl" / "model"
        files = {path.name for path in folder.iterdir()}
        self.assertLessEqual({"adapter_config.json", "adapter_model.safetensors"}, files)
        self.assertNotIn("model.safetensors", files)
        base = answers.base_of(str(folder))
        self.assertEqual(base["sha256"], answers.ChatModel.load(self.model, "cpu").hash)
        taught = answers.ChatModel.load(str(folder), "cpu")
        self.assertNotEqual(taught.hash, base["sha256"])
        self.assertEqual(answers.hash_of(GPT.from_pretrained(folder)), taught.hash)

    def test_an_adapter_of_another_base_is_refused(self):
        folder = self.folder / "adapter"
        shutil.copytree(self.ppo / "rl" / "model", folder)
        other = tiny_chat.write_tiny_chat(self.folder / "other", seed=1)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = other
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with self.assertRaisesRegex(ValueError, "an adapter of another .*: get that base again"):
            answers.ChatModel.load(str(folder), "cpu")

    def test_the_merged_model_is_the_adapted_one(self):
        merged = GPT.from_pretrained(self.ppo / "merged")
        adapted = answers.ChatModel.load(str(self.ppo / "rl" / "model"), "cpu")
        idx = torch.tensor([adapted.encode(answers.get_ask_config(), "Why?")])
        with torch.no_grad():
            logits = adapted.model(idx)[0]
            torch.testing.assert_close(merged(idx)[0], logits, rtol=0, atol=1e-4)
        self.assertIn("modified", (self.ppo / "merged" / "README.md").read_text())
        answers.ChatModel.load(str(self.ppo / "merged"), "cpu")

    def test_a_finished_run_is_not_repeated_and_its_reward_model_tested_on_other_labels(self):
        before = (self.ppo / "rl" / "finished.json").stat().st_mtime_ns
        # Options of another method may change: nothing here depends on them.
        options = ["--dpo.beta=0.5", "--best_of_n.n=2", f"--data.test={self.labels}"]
        printed(self.teach, self.ppo, *options)
        self.assertGreaterEqual(self.summary(self.ppo)["test_accuracy"]["n"], 50)
        self.assertEqual((self.ppo / "rl" / "finished.json").stat().st_mtime_ns, before)

    def test_a_run_with_other_labels_needs_another_folder(self):
        labels = self.folder / "labels.db"
        # Not a copy of the file: what was written last may still be in SQLite's log beside it.
        with (
            contextlib.closing(sqlite3.connect(self.labels)) as source,
            contextlib.closing(sqlite3.connect(labels)) as copy_of_it,
        ):
            source.backup(copy_of_it)
        database = Store(labels)
        database.press(key_id(1), None, "undo", who="me")
        database.close()
        with self.assertRaisesRegex(ValueError, "labels.hash was .* choose another work_dir"):
            self.teach(self.ppo, f"--labels={labels}")

    def test_dpo_learns_from_the_labels_at_once(self):
        folder = self.folder / "dpo"
        printed(self.teach, folder, "--method=dpo", "--data.first=20", "--dpo.epochs=3")
        rows = read_metrics(folder / "rl" / "metrics.jsonl")
        self.assertEqual(len(rows), 8)  # three times all 20 labels, in batches of 8
        summary = self.summary(self.folder / "dpo")
        self.assertGreater(summary["kl"], 0)
        self.assertNotIn("held_out_accuracy", summary)

    def test_best_of_n_learns_from_the_best_and_the_worst_answers(self):
        folder = self.folder / "best"
        options = ["--best_of_n.n=4", "--best_of_n.prompts=20", "--best_of_n.learning_rate=1e-2"]
        printed(self.teach, folder, "--method=best_of_n", f"--base={self.ppo}", *options)
        rows = read_metrics(folder / "rl" / "metrics.jsonl")
        self.assertEqual(len(rows), 3)  # all 20 pairs once, in batches of 8
        # IPO's first loss, before anything is learned: (0 - 1 / (2 beta))^2.
        self.assertAlmostEqual(rows[0]["loss"], 25.0, delta=1e-3)
        summary = self.summary(folder)
        self.assertGreater(summary["kl"], 0)
        reward_model = self.summary(self.ppo)["held_out_accuracy"]
        self.assertEqual(summary["held_out_accuracy"], reward_model)
        # The same answers, one by one: the best is chosen, and the worst rejected.
        [file] = (folder / "rl").glob("pairs_*.jsonl")
        pairs = read_jsonl(file)
        self.assertEqual(len(pairs), 20)
        config = self.best_of_n_config(4)
        model = answers.ChatModel.load(self.model, "cpu")
        judge, _ = Judge.load(self.ppo / "reward" / "model", model.model)
        asked = [pair["prompt"][-1]["content"] for pair in pairs]
        config.ask.request = ""  # it stands behind the questions already
        samples = model.sample(config.ask, asked[:8], 4, config.system.seed, answers.BATCH)
        rewards = torch.stack([
            judge.reward(*(x[i : i + 1] for x in masks_of(samples))) for i in range(32)
        ])
        for i, pair in enumerate(pairs[:8]):
            ranked = sorted(range(4 * i, 4 * i + 4), key=lambda row: rewards[row].item())
            self.assertEqual(pair["rejected"], samples.texts[ranked[0]].strip())
            self.assertEqual(pair["chosen"], samples.texts[ranked[-1]].strip())

    def best_of_n_config(self, n):
        config = teach.get_config()
        config.system.seed = 1
        config.ask.max_new_tokens = 8
        config.best_of_n.n = n
        return config

    def test_pairs_that_were_found_are_not_sampled_again(self):
        model = answers.ChatModel.load(self.model, "cpu")
        judge, _ = Judge.load(self.ppo / "reward" / "model", model.model)
        config = self.best_of_n_config(4)
        prompts = [f"Why {n}?" for n in range(20)]
        find = functools.partial(
            best_of_n.find_pairs, config, self.folder, judge, model, prompts
        )
        pairs = find()
        [file] = self.folder.glob("pairs_*.jsonl")
        whole = file.read_text()
        self.assertEqual(whole.count("\n"), 20)
        # As if it had been killed after the first 8 prompts: then it does the others, as before.
        file.write_text("".join(whole.splitlines(keepends=True)[:8]))
        with mock.patch.object(model, "sample", wraps=model.sample) as sample:
            self.assertEqual(find(), pairs)
        self.assertEqual([len(call.args[1]) for call in sample.call_args_list], [8, 4])
        self.assertEqual(file.read_text(), whole)
        # With other options or another judge they are other pairs.
        config.ask.temperature = 0.5
        self.assertNotEqual(find(), pairs)
        config.ask.temperature = 0.7
        self.assertEqual(find(), pairs)
        with torch.no_grad():
            judge.weight.neg_()
        backwards = [(pair["rejected"], pair["chosen"]) for pair in pairs]
        self.assertEqual([(pair["chosen"], pair["rejected"]) for pair in find()], backwards)
        self.assertEqual(file.read_text(), whole)
        self.assertEqual(len(list(self.folder.glob("pairs_*.jsonl"))), 3)

    def test_answers_that_are_all_alike_are_no_pairs(self):
        model = answers.ChatModel.load(self.model, "cpu")
        judge, _ = Judge.load(self.ppo / "reward" / "model", model.model)
        config = self.best_of_n_config(2)
        config.ask.temperature = 1e-6
        with self.assertRaisesRegex(ValueError, "say the same.* raise --ask.temperature=1e-06"):
            best_of_n.find_pairs(config, self.folder, judge, model, ["Why?", "How?"])

    def test_answers_that_teach_nothing_are_left_out(self):
        def row(chosen, rejected, ended):
            return {"prompt": [], "chosen": chosen, "rejected": rejected, "ended": ended}

        self.assertTrue(lessons.is_usable(row("a", "b", [True, True])))
        self.assertTrue(lessons.is_usable(row("a", "a", [True, False])))  # one was cut off
        self.assertTrue(lessons.is_usable(row("", "a", [True, True])))  # it says nothing, and ends
        self.assertFalse(lessons.is_usable(row("a", "a", [True, True])))
        self.assertFalse(lessons.is_usable(row("a", "", [True, False])))

    def test_no_question_of_the_tests_is_asked_in_training(self):
        training = set(teach.training_prompts(teach.get_config()))
        self.assertEqual(len(training), 400)
        fresh = answers.read_prompts(str(answers.FRESH))
        known = [row["question"] for row in read_jsonl(outcome.KNOWN)]
        self.assertEqual(training & {*fresh, *known}, set())

    def test_many_processes_are_refused(self):
        with (
            mock.patch.object(teach.distributed, "is_launched", lambda: True),
            self.assertRaisesRegex(ValueError, "teach.py runs in one process: start it without"),
        ):
            self.teach(self.folder / "many")

    def test_rl_alone_from_the_reward_model_of_another_run(self):
        folder = self.folder / "rloo"
        printed(self.teach, folder, f"--base={self.ppo}", "--rl.algorithm=rloo")
        self.assertFalse((folder / "reward").exists())
        self.assertEqual(
            self.summary(folder)["held_out_accuracy"], self.summary(self.ppo)["held_out_accuracy"]
        )

    def test_every_algorithm_keeps_its_own_choices(self):
        for name, row in ALGORITHMS.items():
            config = teach.get_config()
            config.rl.algorithm = name
            teach.complete(config)
            choices = choose(config.rl)
            expected = "leave_one_out" if name == "ppo" else row.advantage
            self.assertEqual(choices.advantage, expected, name)
            self.assertEqual(choices.kl_coef, 0.03 if row.kl_penalty != "none" else 0.0, name)

    def test_with_a_value_function_on_the_same_trunk(self):
        folder = self.folder / "gae"
        options = ["--rl.advantage=gae", "--data.compared_with=4"]  # the judge depends on neither
        printed(self.teach, folder, f"--base={self.ppo}", *options)
        rows = read_metrics(folder / "rl" / "metrics.jsonl")
        self.assertTrue(all("val/explained_variance" in row for row in rows))
        rows = read_metrics(self.ppo / "rl" / "metrics.jsonl")
        self.assertFalse(any("val/explained_variance" in row for row in rows))

    def test_conversations_first_and_then_nothing_or_dpo(self):
        talks = self.folder / "talks.jsonl"
        row = {"messages": [{"role": "user", "content": "Hi"},
                            {"role": "assistant", "content": "Hello!"}]}
        talks.write_text(8 * (json.dumps(row) + "\n"))
        options = [f"--sft={talks}", "--finetune.learning_rate=1e-2", "--finetune.epochs=6"]
        printed(self.teach, self.folder / "sft", "--method=none", *options)
        rows = read_metrics(self.folder / "sft" / "sft" / "metrics.jsonl")
        self.assertTrue((self.folder / "sft" / "sft" / "model" / "base.json").exists())
        self.assertTrue(rows)
        base = f"--base={self.folder / 'sft'}"
        printed(self.teach, self.folder / "both", "--method=dpo", base, *options)
        self.assertTrue((self.folder / "both" / "rl" / "model").exists())

    def test_gpt2_reads_a_plain_template_and_learns_the_assistants_turns(self):
        tokenizer = BPETokenizer.train(["User: Hi! Assistant: Hello, how are you?"], 270)
        chat = Chat(tokenizer, answers.PLAIN_TEMPLATE)
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey!"}]
        ids, mask = chat.encode(messages, return_mask=True)
        self.assertEqual(chat.decode(ids), "User: Hi\nAssistant: Hey!<|endoftext|>")
        learned = [i for i, is_learned in zip(ids, mask, strict=True) if is_learned]
        self.assertEqual(chat.decode(learned), " Hey!<|endoftext|>")

    def test_too_few_labels_are_refused(self):
        with self.assertRaisesRegex(ValueError, "holds 3 labels that choose .* 12 is the fewest"):
            lessons.check_number([{}] * 3, "labels.db")
        self.assertIn("few", lessons.check_number([{}] * 30, "labels.db"))
        self.assertEqual(lessons.check_number([{}] * 200, "labels.db"), "")

    def test_no_labels_at_all_are_one_clear_line(self):
        with self.assertRaisesRegex(ValueError, "no such file. First label some pairs"):
            self.teach(self.folder, f"--labels={self.folder / 'nothing.db'}")

    def test_options_that_cannot_be_are_refused(self):
        for option, message in (
            ("--method=pppo", "--method=pppo must be one of ppo, best_of_n, dpo, none"),
            ("--method=none", "teaches nothing without --sft"),
            ("--rl.batch_size=0", "the stage rl cannot run .*batch_size=0"),
            ("--reward.prior=0", "prior=0.0 must be"),
            ("--best_of_n.n=33", "n=33 must be"),
        ):
            with self.subTest(option), self.assertRaisesRegex(ValueError, message):
                self.teach(self.folder, option)

    def compare(self, *options):
        after = self.ppo / "rl" / "model"
        fixed = [f"--before={self.model}", f"--after={after}", f"--work_dir={self.folder}"]
        small = ["--ask.max_new_tokens=8", "--number=30", "--device=cpu"]
        return printed(compare.main, [*fixed, *small, *options])

    def test_a_rule_compares_before_with_after(self):
        first = self.compare("--labeller=simple")
        self.assertRegex(first, r"preferred in [0-9]+% of 30 comparisons \(95% interval")
        self.assertRegex(first, "were alike, and count half")
        self.assertEqual(self.compare("--labeller=simple"), first)
        self.assertIn("of 30", self.compare("--labeller=short"))  # in a file of its own

    def test_which_side_a_model_is_on_is_random_and_fixed_by_the_seed(self):
        config = compare.get_config()
        config.before, config.after = self.model, str(self.ppo / "rl" / "model")
        config.ask.max_new_tokens = 4
        config.device = "cpu"
        duel = compare.Duel(config)
        sides = [pair.left.model == duel.after.hash for pair in duel.pairs(0, 40)]
        self.assertIn(sum(sides), range(8, 33))
        self.assertEqual(sides[10:14], [
            pair.left.model == duel.after.hash for pair in duel.pairs(10, 4)
        ])

    def test_a_model_is_not_compared_with_itself(self):
        with self.assertRaisesRegex(ValueError, "are the same model"):
            self.compare(f"--after={self.model}")


class OutcomeTests(unittest.TestCase):
    def test_points_of_a_comparison(self):
        labels = []
        for choice in ("left", "right", "alike", "skip"):
            pair = a_pair()
            pair.left.model, pair.right.model = "before", "after"
            labels.append(Label("id", pair, choice, None, "me", ""))
        points = compare.points(labels, "after")
        self.assertEqual(points, [0.0, 1.0, 0.5])
        self.assertEqual(compare.win_rate(points).rate, 0.5)

    def test_the_calibration_of_a_reward_model_that_is_as_sure_as_it_should_be(self):
        torch.manual_seed(0)
        differences = 3 * torch.rand(20_000)
        right = torch.rand(20_000) < torch.sigmoid(differences)
        margins = torch.where(right, differences, -differences)
        predicted, _, error = outcome.calibration(margins)
        self.assertEqual(len(predicted), outcome.BINS)
        self.assertLess(error, 0.02)
        *_, error = outcome.calibration(10 * margins)
        self.assertGreater(error, 0.1)

    def test_an_accuracy_that_may_be_luck_is_called_so(self):
        lucky = outcome.accuracy(torch.tensor([1.0, 1.0, -1.0]))
        self.assertIn("may be luck", outcome.in_words(lucky))
        good = outcome.accuracy(torch.ones(40))
        self.assertNotIn("luck", outcome.in_words(good))

    def test_labels_on_one_prompt_are_in_one_part(self):
        rows = [{"prompt": [{"content": str(n // 3)}], "chosen": n} for n in range(60)]
        folds = lessons.folds(rows, 5, seed=0)
        self.assertEqual([folds.count(part) for part in range(5)], [12] * 5)
        prompts = [
            {str(row["prompt"]) for row, fold in zip(rows, folds, strict=True) if fold == part}
            for part in range(5)
        ]
        self.assertEqual(len(set.union(*prompts)), sum(map(len, prompts)))

    def test_all_labels_on_one_prompt_cannot_be_held_out(self):
        rows = [{"prompt": "same", "chosen": n} for n in range(20)]
        with self.assertRaisesRegex(ValueError, "all 20 labels are on one prompt"):
            lessons.folds(rows, 5, seed=0)

    def test_what_is_written_on_the_page_is_a_demonstration(self):
        pair = a_pair()
        labels = [
            Label("id", pair, "better", "mine", "me", ""),
            Label("id", pair, "left", None, "me", ""),
        ]
        [row] = lessons.demonstrations(labels, "labels")
        self.assertEqual(row["messages"][-1], {"role": "assistant", "content": "mine"})


class CompareDeskTests(TempDirTestCase):
    def test_where_answers_are_only_compared_nothing_can_be_written(self):
        with DeskProcess(self.folder, may_write=False) as process:
            client = Client(process.listening_on, process.token)
            client.log_in()
            pair = client.pair()
            status, _, answer = client.press(1, pair["id"], "better", better="mine")
            self.assertEqual((status, "only compared" in answer["error"]), (400, True))
            body = {"id": key_id(2), "prompt": "mine"}
            self.assertEqual(client.request("POST", "/prompts", body)[0], 400)
            self.assertEqual(client.press(3, pair["id"], "left")[0], 200)

    def test_when_there_are_no_more_pairs_the_page_is_told(self):
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        maker = desk.PairMaker(database, lambda typed, id: None)
        self.assertFalse(maker.make_one())
        self.assertTrue(maker.finished)


# --------------------------------------------------------------------------------------------------
# The page, in a real browser


def find_browser():
    """The path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def why_no_browser():
    """What must be installed before the page can be tested; "" if all is there."""
    if importlib.util.find_spec("playwright") is None:
        return "pip install -r requirements-test.txt, which brings playwright"
    if find_browser() is None:
        return "install a Chromium (Debian: apt-get install chromium)"
    return ""


@unittest.skipIf(why_no_browser(), f"to test the page: {why_no_browser()}")
class PageTests(TempDirTestCase):
    MESSAGE_SAYS = "words => element('message').textContent.includes(words)"

    @classmethod
    def setUpClass(cls):
        from playwright.sync_api import sync_playwright

        playwright = sync_playwright().start()
        cls.addClassCleanup(playwright.stop)
        # Chromium's own sandbox does not work for root.
        arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        cls.browser = playwright.chromium.launch(
            executable_path=find_browser(), args=arguments
        )
        cls.addClassCleanup(cls.browser.close)

    def setUp(self):
        super().setUp()
        self.desk = self.enterContext(DeskProcess(self.folder))
        self.complaints = []
        self.context = self.new_context()
        self.page = self.new_page()

    def new_context(self, **options):
        context = self.browser.new_context(**options)
        context.set_default_timeout(10_000)
        self.addCleanup(context.close)
        return context

    def new_page(self, context=None):
        """A tab that shows the first pair. The page's errors are kept in self.complaints."""
        page = (context or self.context).new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.goto(self.desk.address)
        self.wait_for_pair(page)
        return page

    def wait_for_pair(self, page, other_than=None):
        """The number of the pair on the page, as soon as it takes keys."""
        page.wait_for_function(
            "other => state.pair && state.pair.id !== other && !sending"
            " && Date.now() - shownAt >= UNREAD",
            arg=other_than,
            polling=20,
        )
        return page.evaluate("state.pair.id")

    def press(self, key, page=None):
        """Press a key on a pair, and wait for the next one; the number of the pair."""
        page = page or self.page
        pair = self.wait_for_pair(page)
        page.keyboard.press(key)
        self.wait_for_pair(page, other_than=pair)
        return pair

    def wait_until(self, is_so):
        """Wait until is_so(the database)."""
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        deadline = time.time() + 10
        while not is_so(database) and time.time() < deadline:
            time.sleep(0.01)

    def labels(self):
        database = Store(self.folder / "labels.db")
        labels = [(label.pair.id, label.choice) for label in database.labels()]
        database.close()
        return labels

    def test_twenty_pairs_by_keyboard_with_undo_reload_and_kill_and_an_export(self):
        keys = ["ArrowLeft", "ArrowRight", "ArrowDown", "s"]
        expected = []
        for n in range(20):
            key = keys[n % len(keys)]
            expected.append((self.press(key), ["left", "right", "alike", "skip"][n % len(keys)]))
            if n == 5:
                self.page.reload()
            if n == 9:
                self.press("u")  # the pair before comes back
                self.assertEqual(self.page.evaluate("state.pair.id"), expected.pop()[0])
            if n == 13:
                self.desk.kill()
                self.desk.start()
        self.assertEqual(self.labels(), expected)
        self.assertEqual(len({pair for pair, _ in expected}), 19)
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        n_comparisons = sum(choice in ("left", "right") for _, choice in expected)
        path = self.folder / "labels.jsonl"
        self.assertEqual(exchange.export_labels(database, path), n_comparisons)

    def test_two_tabs_at_once(self):
        other = self.new_page()
        shown = self.wait_for_pair(self.page)
        self.assertEqual(self.wait_for_pair(other), shown)
        self.press("ArrowLeft")
        other.keyboard.press("ArrowRight")
        other.wait_for_function(self.MESSAGE_SAYS, arg="answered already, in another window")
        self.wait_for_pair(other, other_than=shown)
        self.press("ArrowRight", other)
        choices = self.labels()
        self.assertEqual([choice for _, choice in choices], ["left", "right"])
        self.assertEqual(len({pair for pair, _ in choices}), 2)

    def test_text_is_shown_as_text_whatever_is_in_it(self):
        for _ in range(4):
            pair = self.page.evaluate("state.pair")
            shown = {
                "prompt": self.page.text_content("#prompt"),
                "left": self.page.text_content("#left .text"),
            }
            self.assertEqual(shown, {"prompt": pair["prompt"], "left": pair["left"]["text"]})
            self.press("ArrowLeft")
        self.assertIn("<script>", self.page.text_content("#who"))
        self.assertEqual(self.page.evaluate("typeof window.hacked"), "undefined")
        self.assertEqual(self.page.locator("article img, article script, iframe").count(), 0)
        self.assertEqual(self.complaints, [])

    def test_markup_could_not_run_a_script_even_if_it_got_into_the_page(self):
        # Were there a mistake in the page's script, the policy still stands: Trusted Types refuse
        # the assignment, and script-src a script without the nonce.
        with self.assertRaisesRegex(Exception, "TrustedHTML"):
            self.page.evaluate("document.body.innerHTML = '<img src=x onerror=hacked=1>'")
        with self.assertRaisesRegex(Exception, "TrustedScript"):
            self.page.evaluate("document.body.setAttribute('onclick', 'window.hacked = 1')")
        self.page.evaluate(
            """() => {
                const policy = trustedTypes.createPolicy("p", { createScript: (text) => text });
                const script = document.createElement("script");
                script.text = policy.createScript("window.hacked = 1");
                document.body.append(script);
            }"""
        )
        self.assertEqual(self.page.evaluate("typeof window.hacked"), "undefined")
        self.assertIn("nonce", self.complaints[-1])

    def test_the_token_leaves_the_address(self):
        self.assertEqual(self.page.evaluate("location.href").count("#"), 0)
        self.assertEqual(self.page.evaluate("document.cookie"), "")

    def test_the_file_that_leads_to_the_page(self):
        with mock.patch("webbrowser.open") as browser, desk.opened(self.desk.address, self.folder):
            page = self.new_context().new_page()
            page.goto(browser.call_args.args[0])
            page.wait_for_url(self.desk.address.partition("#")[0])
            self.wait_for_pair(page)

    def test_without_the_token_the_page_shows_what_to_do(self):
        stranger = self.new_context().new_page()
        stranger.goto(self.desk.address.partition("#")[0])
        stranger.wait_for_function(self.MESSAGE_SAYS, arg="terminal shows")
        self.assertTrue(stranger.is_disabled("[data-choice=left]"))

    def test_a_better_answer_by_keyboard(self):
        pair = self.wait_for_pair(self.page)
        self.page.keyboard.press("ArrowUp")
        self.page.keyboard.type("u s <b>Mine</b>")  # keys that mean something elsewhere
        self.page.keyboard.press("ArrowLeft")
        self.page.keyboard.press("Control+Enter")
        self.wait_for_pair(self.page, other_than=pair)
        database = Store(self.folder / "labels.db")
        self.addCleanup(database.close)
        [label] = database.labels()
        self.assertEqual((label.choice, label.better), ("better", "u s <b>Mine</b>"))

    def test_escape_leaves_the_better_answer(self):
        self.page.keyboard.press("ArrowUp")
        self.page.keyboard.type("no")
        self.page.keyboard.press("Escape")
        self.press("ArrowLeft")
        self.assertEqual([choice for _, choice in self.labels()], ["left"])

    def test_a_typed_prompt_is_answered_next(self):
        shown = self.wait_for_pair(self.page)
        self.page.keyboard.press("p")
        self.page.keyboard.type("<script>How are you?</script>")
        self.page.keyboard.press("Enter")
        self.page.wait_for_function("() => !sending")
        self.assertEqual(self.page.evaluate("state.pair.id"), shown)  # it is being read
        self.wait_until(lambda database: database.typed_prompt() is None)
        self.press("s")
        self.assertEqual(self.page.text_content("#prompt"), "<script>How are you?</script>")

    def test_a_key_that_is_held_down_counts_once(self):
        pair = self.wait_for_pair(self.page)
        for _ in range(5):
            self.page.keyboard.down("ArrowLeft")  # from the second on, these are repeats
            self.page.wait_for_timeout(100)
        self.page.keyboard.up("ArrowLeft")
        self.assertEqual(self.labels(), [(pair, "left")])

    def test_a_pair_that_nobody_can_have_read_takes_no_key(self):
        first = self.wait_for_pair(self.page)
        self.page.keyboard.press("ArrowLeft")
        self.page.wait_for_function("first => state.pair && state.pair.id !== first", arg=first)
        self.page.keyboard.press("ArrowLeft")
        self.page.wait_for_timeout(150)
        self.assertEqual(self.labels(), [(first, "left")])

    def test_a_key_whose_answer_got_lost_is_sent_again_and_counts_once(self):
        sent = []

        def lose(route):
            sent.append(route.request.post_data)
            if len(sent) < 3:
                route.fetch()  # it reaches the server,
                route.abort()  # but the answer does not reach the page
            else:
                route.continue_()

        self.page.route("**/keys", lose)
        pair = self.press("ArrowRight")
        self.assertEqual(len(sent), 3)
        self.assertEqual(len(set(sent)), 1)
        self.assertEqual(self.labels(), [(pair, "right")])

    def test_a_full_disk_is_told_and_the_key_is_sent_until_there_is_room(self):
        sent = []

        def fail(route):
            sent.append(route.request.post_data)
            if len(sent) < 3:
                route.fulfill(status=507, json={"error": "labels.db: the disk is full"})
            else:
                route.continue_()

        self.page.route("**/keys", fail)
        pair = self.wait_for_pair(self.page)
        self.page.keyboard.press("ArrowLeft")
        self.page.wait_for_function(self.MESSAGE_SAYS, arg="disk is full (trying again)")
        self.wait_for_pair(self.page, other_than=pair)
        self.assertEqual((len(sent), len(set(sent))), (3, 1))
        self.assertEqual(self.labels(), [(pair, "left")])

    def test_a_key_that_was_pressed_while_the_server_was_down_survives_a_reload(self):
        pair = self.wait_for_pair(self.page)
        self.desk.kill()
        self.page.keyboard.press("ArrowLeft")
        self.page.wait_for_function(self.MESSAGE_SAYS, arg="does not answer")
        self.assertTrue(self.page.is_disabled("[data-choice=left]"))
        self.desk.start()
        self.page.reload()
        self.wait_for_pair(self.page, other_than=pair)
        self.assertEqual(self.labels(), [(pair, "left")])

    def test_a_phone_of_360_pixels_by_touch(self):
        phone = self.new_context(
            viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True
        )
        page = self.new_page(phone)
        self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), 360)
        for button in page.locator("[data-choice]").all():
            box = button.bounding_box()
            self.assertGreaterEqual(min(box["width"], box["height"]), 44)
            self.assertLessEqual(box["x"] + box["width"], 360)
        pair = self.wait_for_pair(page)
        page.tap("[data-choice=right]")
        self.wait_for_pair(page, other_than=pair)
        page.tap("[data-choice=undo]")
        page.wait_for_function("pair => state.pair.id === pair", arg=pair)
        self.wait_for_pair(page)
        page.tap("[data-choice=better]")
        page.fill("#better-text", "mine")
        page.locator("#better button.main").tap()
        self.wait_for_pair(page, other_than=pair)
        self.assertEqual(self.labels(), [(pair, "better")])

    def test_light_and_dark_are_easy_to_read(self):
        backgrounds = []
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            backgrounds.append(self.colour("body", "backgroundColor"))
            for text, behind in (
                ("#left .text", "#left"),
                ("#left .quiet", "#left"),
                ("h1", "body"),
                ("#message", "body"),
                ("button.main", "button.main"),
            ):
                pair = (self.colour(text, "color"), self.colour(behind, "backgroundColor"))
                # WCAG 2.1, success criterion 1.4.3.
                self.assertGreaterEqual(contrast(*pair), 4.5, (scheme, text))
        self.assertNotEqual(*backgrounds)

    def colour(self, selector, name):
        """A computed colour as three numbers."""
        style = f"getComputedStyle(document.querySelector('{selector}')).{name}"
        return [int(number) for number in re.findall(r"\d+", self.page.evaluate(style))][:3]


def contrast(one, other):
    """The contrast of two colours, from 1 to 21 (WCAG 2.1)."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    """The relative luminance of a colour (WCAG 2.1)."""
    linear = []
    for number in colour:
        c = number / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


if __name__ == "__main__":
    unittest.main()
