"""
Where labels are kept: one SQLite file that no crash can hurt.

    pairs     a prompt and two answers to it, with all that is known about how they were sampled
    keys      what a person pressed: which answer of a pair is better, or undo
    prompts   what a person typed into the page, to be answered next
    meta      the port and the token of the server, so that it keeps them when it is restarted

A key is never changed or removed. Its id is made by the page, and the database takes each id once.
So the page may send a key as often as it likes, until it hears that the key is stored: sending it
again changes nothing. "Stored" means that it is on the disk (WAL, synchronous=FULL).

An answer to a pair is called a decision here: one of CHOICES. A pair has one decision at most, and
a second window that decides the same pair is refused. Undo is a key, too: it marks the last
decision as undone, and the pair is open again.
"""

import contextlib
import getpass
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VERSION = 1
APPLICATION = 0x6D524C48  # "mRLH": tells our databases from those of other programs
CHOICES = ("left", "right", "alike", "better", "skip")
LONGEST_TEXT = 4000  # characters, of what people type
LONGEST_ID = 100

SCHEMA = """
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE prompts (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    prompt TEXT NOT NULL,
    at TEXT NOT NULL,
    problem TEXT
);
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY,
    prompt TEXT NOT NULL,
    messages TEXT NOT NULL,
    left_text TEXT NOT NULL,
    right_text TEXT NOT NULL,
    left_ids TEXT,
    right_ids TEXT,
    left_ended INTEGER NOT NULL,
    right_ended INTEGER NOT NULL,
    left_model TEXT,
    right_model TEXT,
    sampling TEXT NOT NULL,
    typed TEXT UNIQUE REFERENCES prompts (id),
    imported TEXT UNIQUE,
    at TEXT NOT NULL
);
CREATE TABLE keys (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    pair INTEGER NOT NULL REFERENCES pairs (id),
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'alike', 'better', 'skip', 'undo')),
    better TEXT,
    who TEXT NOT NULL,
    at TEXT NOT NULL,
    undone_by TEXT
);
CREATE UNIQUE INDEX one_decision_a_pair ON keys (pair)
    WHERE undone_by IS NULL AND choice <> 'undo';
"""
IS_DECISION = "undone_by IS NULL AND choice <> 'undo'"
IS_OPEN = f"id NOT IN (SELECT pair FROM keys WHERE {IS_DECISION})"


class Refused(ValueError):
    """A key or a prompt that the database does not take. Sending it again would not help."""


class StoreError(OSError):
    """The database could not be written or read: a full disk, for example. Nothing was changed."""


@dataclass
class Answer:
    """One answer of a model, or of a person."""

    text: str
    ids: list[int] | None = None  # its tokens, the end included; None where they are not known
    ended: bool = True  # by itself; False where it was cut off
    model: str | None = None  # hash of the model's weights; None where no model wrote it


@dataclass
class Pair:
    """Two answers to a prompt."""

    prompt: str  # what a person would ask
    messages: list[dict]  # what the model was asked: with a system prompt, for example
    left: Answer
    right: Answer
    sampling: dict[str, Any]  # temperature, max_new_tokens, seed, ...
    typed: str | None = None  # the id of the prompt, if a person typed it into the page
    imported: str | None = None  # the id of the row, if it comes from a file
    id: int | None = None  # its number in the database


@dataclass
class Label:
    """A pair and its decision. better: the answer that a person wrote, with the choice better."""

    id: str
    pair: Pair
    choice: str
    better: str | None
    who: str
    at: str

    def comparisons(self) -> list[tuple[Answer, Answer]]:
        """(chosen, rejected) answers: none where they are alike, two where one was written."""
        left, right = self.pair.left, self.pair.right
        if self.choice == "left":
            return [(left, right)]
        if self.choice == "right":
            return [(right, left)]
        if self.choice == "better":
            assert self.better is not None
            return [(Answer(self.better), left), (Answer(self.better), right)]
        return []


class Store:
    """The database at `path`, made if need be. It may be used by several threads and processes.

    Raises ValueError for a file that is no such database, or one of another version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What people like is nobody else's business: mode 0600, before anything is in it. SQLite
        # gives its two other files, -wal and -shm, the same mode.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        self.path.chmod(0o600)
        self.lock = threading.RLock()
        with self.explained():
            self.connection = sqlite3.connect(
                self.path, timeout=20, isolation_level=None, check_same_thread=False
            )
            self.connection.row_factory = sqlite3.Row
            self.connection.execute("PRAGMA foreign_keys = ON")
            self.open_or_create()

    def open_or_create(self) -> None:
        """Set the database up, or check that it is one of ours."""
        mode = self.connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise ValueError(
                f"{self.path}: SQLite cannot keep a write-ahead log here (it says {mode!r}), as on "
                "some network drives: choose a --work_dir on a local disk"
            )
        # Every commit waits until its data is on the disk.
        self.connection.execute("PRAGMA synchronous = FULL")
        with self.transaction():
            if self.pragma("user_version") == 0 and not self.rows("SELECT 1 FROM sqlite_master"):
                for statement in SCHEMA.split(";"):
                    self.connection.execute(statement)
                self.connection.execute(f"PRAGMA application_id = {APPLICATION}")
                self.connection.execute(f"PRAGMA user_version = {VERSION}")
            if self.pragma("application_id") != APPLICATION:
                raise ValueError(f"{self.path} is the database of another program: move it away")
            version = self.pragma("user_version")
            if version != VERSION:
                raise ValueError(
                    f"{self.path} was written by version {version} of this project, and this is "
                    f"version {VERSION}: export its labels with that version and import them here, "
                    "into another --work_dir"
                )

    def close(self) -> None:
        """Close the database. It need not be: nothing is kept back."""
        with self.lock:
            self.connection.close()

    # -- talking to SQLite -------------------------------------------------------------------------

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within, errors of SQLite become one line that says what to do."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # ours to understand
        except sqlite3.Error as error:
            message = str(error)
            if "disk is full" in message:
                raise StoreError(
                    f"{self.path}: the disk is full. What was acknowledged is safe: make room, and "
                    "go on"
                ) from error
            if "not a database" in message or "malformed" in message:
                raise ValueError(f"{self.path} is damaged, or no SQLite file: {message}") from error
            raise StoreError(f"{self.path}: {message}") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within is stored together, or nothing of it is."""
        with self.lock, self.explained():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                # SQLite ends the transaction itself where the disk is full.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """The rows that a query finds."""
        with self.lock, self.explained():
            return self.connection.execute(query, values).fetchall()

    def number(self, query: str, *values: Any) -> int:
        """The one number that a query finds."""
        return self.rows(query, *values)[0][0]

    def pragma(self, name: str) -> int:
        """A number in the header of the file."""
        return self.number(f"PRAGMA {name}")

    def insert(self, table: str, **values: Any) -> int:
        """Insert a row, within a transaction; its number."""
        names = ", ".join(values)
        places = ", ".join("?" * len(values))
        statement = f"INSERT INTO {table} ({names}) VALUES ({places})"
        return self.connection.execute(statement, tuple(values.values())).lastrowid or 0

    # -- the server's own --------------------------------------------------------------------------

    def remembered(self, name: str) -> str | None:
        """What `remember` has kept under this name."""
        rows = self.rows("SELECT value FROM meta WHERE name = ?", name)
        return rows[0]["value"] if rows else None

    def remember(self, **values: str) -> None:
        """Keep some values, in the place of older ones of the same names."""
        with self.transaction():
            for name, value in values.items():
                self.connection.execute("REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- prompts and pairs -------------------------------------------------------------------------

    def add_prompt(self, id: str, prompt: str) -> None:
        """Keep a prompt that a person has typed. The same id again changes nothing."""
        check_id(id)
        prompt = check_text("prompt", prompt)
        with self.transaction():
            old = self.rows("SELECT prompt FROM prompts WHERE id = ?", id)
            if old and old[0]["prompt"] != prompt:
                raise Refused(f"the id {id!r} belongs to another prompt")
            if not old:
                self.insert("prompts", id=id, prompt=prompt, at=now())

    def typed_prompt(self) -> tuple[str, str] | None:
        """(id, prompt) of the oldest typed prompt that waits for answers."""
        rows = self.rows(
            "SELECT id, prompt FROM prompts WHERE problem IS NULL AND id NOT IN "
            "(SELECT typed FROM pairs WHERE typed IS NOT NULL) ORDER BY number LIMIT 1"
        )
        return (rows[0]["id"], rows[0]["prompt"]) if rows else None

    def give_up_prompt(self, id: str, problem: str) -> None:
        """Say that a typed prompt cannot be answered, and why: it does not wait any more."""
        with self.transaction():
            statement = "UPDATE prompts SET problem = ? WHERE id = ?"
            self.connection.execute(statement, (problem, id))

    def add_pairs(self, pairs: list[Pair]) -> None:
        """Keep some pairs: all or none of them."""
        with self.transaction():
            for pair in pairs:
                pair.id = self.insert("pairs", **as_row(pair))

    def open_pairs(self, limit: int = 1, keep: int | None = None) -> list[Pair]:
        """Pairs without a decision, in the order in which people should see them.

        keep: the number of a pair that somebody is reading. If it is open, it stays the first.
        Then come answers to typed prompts, and then the oldest.
        """
        rows = self.rows(
            f"SELECT * FROM pairs WHERE {IS_OPEN} "
            "ORDER BY id IS NOT ?, typed IS NULL, id LIMIT ?",
            -1 if keep is None else keep,
            limit,
        )
        return [as_pair(row) for row in rows]

    def count_open(self) -> int:
        """How many pairs have no decision."""
        return self.number(f"SELECT count(*) FROM pairs WHERE {IS_OPEN}")

    def count_pairs(self) -> int:
        """How many pairs there are."""
        return self.number("SELECT count(*) FROM pairs")

    def count_from_list(self) -> int:
        """How many pairs answer prompts of the list: those that were not typed or imported."""
        return self.number(
            "SELECT count(*) FROM pairs WHERE typed IS NULL AND imported IS NULL"
        )

    # -- keys --------------------------------------------------------------------------------------

    def press(
        self, id: str, pair: int | None, choice: str, who: str, better: str | None = None
    ) -> int:
        """Store a key; the number of its pair. The same key again changes nothing.

        id: made by the page, for this key alone. pair: the number of the pair; None for undo, which
        takes back the last decision. Raises Refused for a key that cannot be taken: because its
        pair is decided already, for example.
        """
        check_id(id)
        if choice == "better":
            better = check_text("better answer", better)
        with self.transaction():
            old = self.rows("SELECT pair, choice, better FROM keys WHERE id = ?", id)
            if old:
                return self.check_same(id, old[0], pair, choice, better)
            if choice == "undo":
                return self.undo(id, who)
            return self.decide(id, pair, choice, who, better)

    def check_same(
        self, id: str, old: sqlite3.Row, pair: int | None, choice: str, better: str | None
    ) -> int:
        """The number of the pair of a key that is stored already; Refused if it was another key."""
        same_pair = choice == "undo" or old["pair"] == pair
        if not same_pair or old["choice"] != choice or old["better"] != better:
            raise Refused(f"the id {id!r} belongs to another key")
        return old["pair"]

    def decide(
        self, id: str, pair: int | None, choice: str, who: str, better: str | None
    ) -> int:
        """Store a decision, within a transaction."""
        if choice not in CHOICES:
            raise Refused(f"choice={choice!r} must be one of {', '.join(CHOICES)}, undo")
        if choice != "better" and better is not None:
            raise Refused(f"choice={choice!r} comes without a better answer")
        if not is_pair_number(pair) or not self.rows("SELECT 1 FROM pairs WHERE id = ?", pair):
            raise Refused(f"there is no pair {pair!r}")
        try:
            self.insert("keys", id=id, pair=pair, choice=choice, better=better, who=who, at=now())
        except sqlite3.IntegrityError:
            raise Refused("this pair was answered already, in another window") from None
        assert isinstance(pair, int)
        return pair

    def undo(self, id: str, who: str) -> int:
        """Take back the last decision, within a transaction. Imported labels stay."""
        rows = self.rows(
            f"SELECT id, pair FROM keys WHERE {IS_DECISION} AND pair NOT IN "
            "(SELECT id FROM pairs WHERE imported IS NOT NULL) ORDER BY number DESC LIMIT 1"
        )
        if not rows:
            raise Refused("there is nothing to undo")
        last = rows[0]
        self.insert("keys", id=id, pair=last["pair"], choice="undo", who=who, at=now())
        statement = "UPDATE keys SET undone_by = ? WHERE id = ?"
        self.connection.execute(statement, (id, last["id"]))
        return last["pair"]

    # -- what has been decided ---------------------------------------------------------------------

    def labels(self) -> list[Label]:
        """Every decision that was not undone, in order."""
        rows = self.rows(
            "SELECT pairs.*, keys.id AS key, choice, better, who, keys.at AS decided "
            f"FROM keys JOIN pairs ON keys.pair = pairs.id WHERE {IS_DECISION} ORDER BY number"
        )
        return [
            Label(
                id=row["key"],
                pair=as_pair(row),
                choice=row["choice"],
                better=row["better"],
                who=row["who"],
                at=row["decided"],
            )
            for row in rows
        ]

    def count_labels(self) -> dict[str, int]:
        """{choice: how many decisions}, of all choices."""
        counts = dict.fromkeys(CHOICES, 0)
        query = f"SELECT choice, count(*) AS n FROM keys WHERE {IS_DECISION} GROUP BY choice"
        for row in self.rows(query):
            counts[row["choice"]] = row["n"]
        return counts

    def count_comparisons(self) -> int:
        """How many decisions say that an answer is better than another one."""
        counts = self.count_labels()
        return counts["left"] + counts["right"] + counts["better"]

    def add_label(self, pair: Pair, id: str, who: str) -> bool:
        """Keep a pair from a file, whose left answer was chosen. False if it is there already."""
        with self.transaction():
            known = self.rows("SELECT 1 FROM pairs WHERE imported = ?", id)
            if known or self.rows("SELECT 1 FROM keys WHERE id = ?", id):
                return False
            number = self.insert("pairs", **as_row(pair), imported=id)
            self.insert("keys", id=id, pair=number, choice="left", who=who, at=now())
            return True


# --------------------------------------------------------------------------------------------------
# Between dataclasses and rows


def as_row(pair: Pair) -> dict[str, Any]:
    """The columns of a pair."""
    row: dict[str, Any] = {
        "prompt": pair.prompt,
        "messages": json.dumps(pair.messages),
        "sampling": json.dumps(pair.sampling, allow_nan=False),
        "typed": pair.typed,
        "at": now(),
    }
    for side, answer in (("left", pair.left), ("right", pair.right)):
        row[f"{side}_text"] = answer.text
        row[f"{side}_ids"] = None if answer.ids is None else json.dumps(answer.ids)
        row[f"{side}_ended"] = int(answer.ended)
        row[f"{side}_model"] = answer.model
    return row


def as_pair(row: sqlite3.Row) -> Pair:
    """The pair in a row."""
    return Pair(
        prompt=row["prompt"],
        messages=json.loads(row["messages"]),
        left=as_answer(row, "left"),
        right=as_answer(row, "right"),
        sampling=json.loads(row["sampling"]),
        typed=row["typed"],
        imported=row["imported"],
        id=row["id"],
    )


def as_answer(row: sqlite3.Row, side: str) -> Answer:
    """The left or the right answer in a row."""
    ids = row[f"{side}_ids"]
    return Answer(
        text=row[f"{side}_text"],
        ids=None if ids is None else json.loads(ids),
        ended=bool(row[f"{side}_ended"]),
        model=row[f"{side}_model"],
    )


def now() -> str:
    """The time, as text that sorts."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_pair_number(value: Any) -> bool:
    """Whether a value could be the number of a pair: SQLite's have 63 bits."""
    return type(value) is int and 0 < value < 2**63


def this_person() -> str:
    """The name of whoever uses this computer, as the system knows it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may know no names
        return "somebody"


def check_id(id: Any) -> None:
    """Refused for an id that no page makes."""
    if not isinstance(id, str) or not 8 <= len(id) <= LONGEST_ID:
        raise Refused(f"an id must be a string of 8 to {LONGEST_ID} characters, not {id!r:.60}")


def check_text(what: str, text: Any) -> str:
    """The text without spaces around it. Refused if it is empty, too long, or no text."""
    if not isinstance(text, str) or not text.strip():
        raise Refused(f"the {what} is empty: write something")
    if len(text) > LONGEST_TEXT:
        raise Refused(f"the {what} has {len(text)} characters; {LONGEST_TEXT} are allowed")
    check_encodable(what, text)
    return text.strip()


def check_encodable(what: str, text: str) -> None:
    """Refused for text that is none: JSON can hold half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(f"the {what} holds half a character (a lone surrogate)") from None
