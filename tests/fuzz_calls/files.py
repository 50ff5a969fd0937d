"""Checkpoints, metrics, run folders, downloads, plots."""

import json
import math

import torch

from tests.fuzz import Plan, generator
from tests.fuzz_calls.texts import NO_PATHS

BROKEN = [
    "b''",
    "b'abc'",
    "b'PK\\x03\\x04' + bytes(50)",
    "b'\\x80\\x02K\\x01.'",
    "bytes(1000)",
    "'{}'.encode('utf-16')",
    "b'\\xff' * 200",
]


@generator("save_torch")
def save_torch(draw):
    values = draw.choice(["{'a': torch.ones(3)}", "{}", "{'x': [1, 'a', None], 'y': {'z': 2.5}}"])

    def right(result, path, obj):
        from mingpt.checkpoint import load_torch

        loaded = load_torch(path)
        assert str(loaded) == str(obj)

    wrong = {"_1path": [*NO_PATHS, "FOLDER / 'file' / 'x.pt'"]}
    arguments = {"_1path": "FOLDER / 'a' / 'x.pt'", "_2obj": values}
    return Plan(
        "save_torch",
        arguments,
        right,
        wrong,
        ["write('file', 'x')"],
        {"_1path": "file|path"},
        ("OSError",),
    )


@generator("load_torch", 2)
def load_torch(draw):
    setup = [
        "torch.save({'a': torch.ones(3), 'n': 1}, FOLDER / 'good.pt')",
        "good = (FOLDER / 'good.pt').read_bytes()",
        draw.choice(
            [
                f"write('bad.pt', {draw.choice(BROKEN)})",
                f"write('bad.pt', good[:{draw.randint(0, 1000)}])",
                "torch.save([1], FOLDER / 'bad.pt')",
                "torch.save({'a': nn.Linear(2, 2)}, FOLDER / 'bad.pt')",
                "torch.save({'f': CfgNode(a=1)}, FOLDER / 'bad.pt')",
                "(FOLDER / 'bad.pt').mkdir()",
            ]
        ),
    ]

    def right(result, path):
        assert torch.equal(result["a"], torch.ones(3)) and result["n"] == 1

    wrong = [
        "FOLDER / 'bad.pt'",
        "FOLDER / 'bad.pt'",
        "FOLDER / 'no.pt'",
        "FOLDER",
        "'x' * 5000",
        "'\\0'",
        *NO_PATHS,
    ]
    return Plan(
        "load_torch",
        {"_path": "FOLDER / 'good.pt'"},
        right,
        {"_path": wrong},
        setup,
        {"_path": "fuzz-|path|x{20}"},
    )


@generator("to_json")
def to_json(draw):
    source = draw.choice(
        [
            "{'a': [1, 2.5, None, True]}",
            "[math.nan, math.inf, 1]",
            "'é日'",
            "3",
            "{'x': (1, {'y': -math.inf})}",
            "{}",
        ]
    )

    def right(result, value):
        def replaced(x):
            if isinstance(x, dict):
                return {k: replaced(v) for k, v in x.items()}
            if isinstance(x, (list, tuple)):
                return [replaced(v) for v in x]
            return None if isinstance(x, float) and not math.isfinite(x) else x

        assert json.loads(result, parse_constant=lambda c: 1 / 0) == replaced(value)
        assert result.isascii()

    wrong = ["object()", "{1, 2}", "b'x'", "{(1, 2): 3}", "torch.ones(2)", "[print]"]
    return Plan(
        "to_json",
        {"_value": source},
        right,
        {"_value": wrong},
        alias={"_value": "not JSON serializable|keys must be|Object of type"},
    )


@generator("read_json")
def read_json(draw):
    content = draw.choice(
        [
            "''",
            "'[1]'",
            "'{'",
            "'null'",
            "'NaN'",
            "'é'.encode('latin-1')",
            "'{}'.encode('utf-16')",
            "'[' * 100000",
            "'{\"a\":' * 100000",
            "'3'",
            "b'\\x00'",
        ]
    )
    setup = ["write('good.json', '{\"a\": [1]}')", f"write('bad.json', {content})"]

    def right(result, path):
        assert result == {"a": [1]}

    wrong = [
        "FOLDER / 'bad.json'",
        "FOLDER / 'bad.json'",
        "FOLDER / 'no.json'",
        "FOLDER",
        "'x' * 5000",
        *NO_PATHS,
    ]
    return Plan(
        "read_json",
        {"_path": "FOLDER / 'good.json'"},
        right,
        {"_path": wrong},
        setup,
        {"_path": "fuzz-|path|x{20}"},
    )


@generator("read_metrics")
def read_metrics(draw):
    rows = [{"iter": i, "loss": draw.random()} for i in range(draw.randint(0, 4))]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    tail = draw.choice(["", '{"iter": 9, "lo', "garbage\n", "[1]\n", "\n\n", "\ud83d"[:0]])
    setup = [f"write('m.jsonl', {(content + tail)!r})"]

    def right(result, path):
        assert result == rows

    good = draw.choice(["FOLDER / 'm.jsonl'", "str(FOLDER / 'm.jsonl')"])
    wrong = ["FOLDER", *NO_PATHS]
    return Plan(
        "read_metrics", {"_path": good}, right, {"_path": wrong}, setup, {"_path": "fuzz-|path"}
    )


@generator("RunFolder.claim")
def claim(draw):
    """The same options may be claimed again; others may not once there is a checkpoint."""

    def right(result, options, free):
        from tests.fuzz_names import FOLDER

        assert json.loads((FOLDER / "run" / "config.json").read_text())["a"] == options["a"]

    setup = [
        "folder = RunFolder(FOLDER / 'run')",
        "folder.claim({'a': 1, 'b': 0.5}, set())",
        "save_torch(FOLDER / 'run' / 'checkpoint.pt', {})",
    ]
    wrong = {
        "options": [
            "{'a': 2, 'b': 0.5}",
            "{'b': 0.5}",
            "{'a': '1', 'b': 0.5}",
            "None",
            "{'a': 1, 'b': 0.5, 'c': 3}",
            "[1]",
        ]
    }
    options = draw.choice(["{'a': 1, 'b': 0.5}", "{'b': 0.5, 'a': 1}", "{'a': 1, 'b': 9}"])
    arguments = {"options": options, "free": "{'b'}"}
    return Plan("folder.claim", arguments, right, wrong, setup, {"options": "option|a was|c was"})


@generator("RunFolder")
def run_folder(draw):
    arguments = {"_path": draw.choice(["FOLDER / 'r'", "None", "str(FOLDER)"])}
    wrong = {"_path": ["3", "['x']", "3.5", "True"]}
    return Plan("RunFolder", arguments, lambda result, path: None, wrong, alias={"_path": "path"})


@generator("finished")
def finished(draw):
    content = draw.choice(["b''", "b'junk'", "b'PK\\x03\\x04'"])
    setup = [
        "save_torch(FOLDER / 'yes' / 'checkpoint.pt', {'finished': True})",
        "save_torch(FOLDER / 'no' / 'checkpoint.pt', {'finished': False})",
        f"write('bad/checkpoint.pt', {content})",
    ]

    def right(result, folder):
        assert (result is not None) == str(folder).endswith("yes")

    good = draw.choice(["FOLDER / 'yes'", "str(FOLDER / 'no')", "FOLDER / 'missing'"])
    wrong = ["FOLDER / 'bad'", "FOLDER / 'bad'", *NO_PATHS]
    return Plan(
        "finished",
        {"_folder": good},
        right,
        {"_folder": wrong},
        setup,
        {"_folder": "fuzz-|path|checkpoint"},
    )


@generator("download")
def fetch(draw):
    """An existing file is returned without the network, where all arguments are right."""

    def right(result, url, path, **options):
        assert str(result) == str(path)

    arguments = {
        "url": draw.choice(["'https://example.com/x'", "'http://127.0.0.1:9/x'"]),
        "path": draw.choice(["FOLDER / 'here'", "str(FOLDER / 'here')"]),
        "sha256": draw.choice(["None", "'0' * 64"]),
        "size": draw.choice(["None", "5"]),
        "tries": draw.choice(["1", "5"]),
        "timeout": draw.choice(["1", "30.0"]),
        "headers": draw.choice(["None", "{'Authorization': 'Bearer x '}"]),
    }
    wrong = {
        "url": ["'ftp://x/y'", "''", "None", "3", "'example.com'", "'https://'", "b'http://x'"],
        "path": [*NO_PATHS, "FOLDER"],
        "sha256": ["'abc'", "3", "'G' * 64", "''"],
        "size": ["-1", "1.5", "'5'", "True"],
        "tries": ["0", "-1", "1.5", "None", "'3'", "True"],
        "timeout": ["0", "-1", "None", "'3'", "math.nan", "math.inf"],
        "headers": ["{'a': 'b\\nc'}", "{'a': 3}", "{'a': 'é'}", "[1]", "'x'", "3"],
    }
    return Plan(
        "download.download",
        arguments,
        right,
        wrong,
        ["write('here', 'x')"],
        {"headers": "header"},
        ("ConnectionError",),
    )


@generator("plot_metrics", 0.15)
def plot_metrics(draw):
    def right(result, path, panels):
        from pathlib import Path

        if not any(any(y == y for y in ys) for c in panels.values() for _, ys in c.values()):
            assert not Path(path).exists()  # there is nothing to draw
            return
        assert Path(path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    panels = draw.choice(
        [
            "{'loss': {'train': ([1, 2], [3.0, None])}}",
            "{'a': {'x': ([1], [2])}, 'b': {}}",
            "{'a': {'x': ([], [])}}",
            "{'a': {'x': ([1, 2], [math.nan, 3])}}",
        ]
    )
    wrong = {
        "path": [*NO_PATHS],
        "panels": [
            "None",
            "[1]",
            "{'a': 3}",
            "{'a': {'x': 3}}",
            "{'a': {'x': ([1, 2], [1])}}",
            "{'a': {'x': ([1], ['b'])}}",
            "{'a': {'x': ([1],)}}",
            "'abc'",
        ],
    }
    arguments = {"path": "FOLDER / 'p.png'", "panels": panels}
    return Plan("plot_metrics", arguments, right, wrong, alias={"panels": "panel|curve|points"})


@generator("write_text")
def write_text(draw):
    def right(result, path, text):
        from pathlib import Path

        assert Path(path).read_bytes() == text.encode()

    wrong = {"_1path": NO_PATHS, "_2text": ["None", "3", "b'x'", r"'\ud800'"]}
    arguments = {"_1path": "FOLDER / 'a' / 't.txt'", "_2text": draw.choice(["'x'", "''", "'日本'"])}
    return Plan("write_text", arguments, right, wrong, alias={"_2text": "text|surrogates"})
