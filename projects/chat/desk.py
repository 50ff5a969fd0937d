"""
The desk at which a person sits: pairs are made ahead in a thread, while the page shows one of them.

`run_desk` puts the database, the thread and the server together. label.py and compare.py differ
only in how they make a pair.
"""

import contextlib
import logging
import os
import statistics
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import server
from store import Answer, Pair, Store

logger = logging.getLogger("mingpt.chat")

AHEAD = 2  # pairs that wait for a person, the one on the page included
PAUSE = 2.0  # seconds between attempts, where a pair could not be made

# Makes the next pair, or returns None if there are no more. The arguments are the text of a prompt
# that a person has typed, and its id; both are None if the pair is to be of the list.
MakePair = Callable[[str | None, str | None], Pair | None]


class PairMaker(threading.Thread):
    """Keeps AHEAD open pairs in the database, and answers typed prompts at once."""

    def __init__(self, store: Store, make_pair: MakePair):
        super().__init__(daemon=True, name="pairs")
        self.store = store
        self.make_pair = make_pair
        self.problem = ""  # why no pair could be made, for the page
        self.notice = ""  # why the last prompt that was typed has no answers
        self.finished = False  # there are no more pairs
        self.wanted = threading.Event()
        self.stopping = False

    def run(self) -> None:
        """Make pairs until `stop`."""
        while not self.stopping:
            self.wanted.clear()
            try:
                made_one = self.make_one()
                self.problem = ""
            # Whatever goes wrong, the person must see it, and the labels can still be stored.
            except Exception as error:
                logger.exception("no pair could be made; trying again")
                self.problem = f"no pair could be made: {error}"
                self.wanted.wait(PAUSE)
                continue
            if not made_one:
                self.wanted.wait()

    def make_one(self) -> bool:
        """Make a pair if one is needed; whether it was."""
        typed = self.store.typed_prompt()
        if typed is None and self.store.count_open() >= AHEAD:
            return False
        id, prompt = typed or (None, None)
        try:
            pair = self.make_pair(prompt, id)
        except ValueError as error:
            if id is None:
                raise
            # It is too long, say: trying again would keep all other pairs waiting.
            self.store.give_up_prompt(id, str(error))
            self.notice = f"Your prompt cannot be answered: {error}"
            return True
        self.notice = self.notice if id is None else ""
        self.finished = pair is None
        if pair is None:
            return False
        self.store.add_pairs([pair])
        return True

    def wake(self) -> None:
        """Say that something has changed in the database."""
        self.wanted.set()

    def stop(self) -> None:
        """End the thread, after the pair that it is making."""
        self.stopping = True
        self.wanted.set()
        self.join(timeout=30)


def run_desk(
    store: Store,
    make_pair: MakePair,
    *,
    who: str,
    goal: int,
    port: int = 0,
    open_browser: bool = True,
    may_write: bool = True,
) -> None:
    """Serve the page until Ctrl-C.

    goal: how many labels the person wants to give. may_write: whether the person may write answers
    and prompts.
    """
    listener = server.listen(store, port)
    maker = PairMaker(store, make_pair)
    routes = server.Routes(
        store,
        lambda shown: describe(store, maker, shown, who, goal, may_write),
        listener.getsockname()[1],
        who,
        wake=maker.wake,
        may_write=may_write,
    )
    address = server.address(store)
    print(f"The page is at {address}", flush=True)
    print("A label is on the disk as soon as you see the next pair. Ctrl-C ends.", flush=True)
    maker.start()
    try:
        with contextlib.ExitStack() as stack:
            if open_browser:
                stack.enter_context(opened(address, store.path.parent))
            server.serve(routes.app(), listener)
    finally:
        maker.stop()


@contextlib.contextmanager
def opened(address: str, folder: Path) -> Iterator[None]:
    """Open the address in the browser, by way of a file that leads there.

    Everybody on this computer can see the arguments with which a program is started, and the token
    must not be among them. The file is for its owner alone, and is removed afterwards.
    """
    path = folder / "open.html"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as f:
        f.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">\n')
    webbrowser.open(path.resolve().as_uri())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def describe(
    store: Store, maker: PairMaker, shown: int | None, who: str, goal: int, may_write: bool
) -> dict[str, Any]:
    """What the page shows. shown: the number of the pair that it is showing already."""
    return {
        "pair": pair_for_page(store, shown),
        "count": sum(n for choice, n in store.count_labels().items() if choice != "skip"),
        "goal": goal,
        "lengths": lengths(store) if may_write else "",
        "who": f"as {who}" if who else "",
        "finished": maker.finished,
        "may_write": may_write,
        "problem": maker.problem or maker.notice,
    }


def pair_for_page(store: Store, shown: int | None) -> dict[str, Any] | None:
    """The pair that the page shows: the one that it is showing already, while it is open."""
    pairs = store.open_pairs(keep=shown)
    if not pairs:
        return None
    pair = pairs[0]
    return {
        "id": pair.id,
        "prompt": pair.prompt,
        "left": answer_for_page(pair.left),
        "right": answer_for_page(pair.right),
    }


def answer_for_page(answer: Answer) -> dict[str, Any]:
    """An answer, without which model wrote it: nobody should know that before deciding."""
    return {"text": answer.text, "ended": answer.ended}


def lengths(store: Store) -> str:
    """How long the chosen and the rejected answers are: people often prefer long ones unawares."""
    chosen = []
    rejected = []
    for label in store.labels():
        for better, worse in label.comparisons():
            chosen.append(len(better.text.split()))
            rejected.append(len(worse.text.split()))
    if not chosen:
        return ""
    return (
        f"words in what you choose: {statistics.fmean(chosen):.0f}, and in what you reject: "
        f"{statistics.fmean(rejected):.0f}"
    )
