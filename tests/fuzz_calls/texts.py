"""Tokenizers, datasets and files of text, against tiktoken, transformers and plain Python."""

import functools
import json

import torch

from tests.fuzz import Draw, Plan, generator

TEXTS = [
    "",
    " ",
    "hello world",
    "I'm 7 now,  don't\n\n you",
    "naïve café",
    "日本語テキスト",
    "👩‍👩‍👧 🎉",
    "a" * 300,
    "\t\r\n \u2028x\u00a0y",
    "<|endoftext|>",
    "e\u0301 ʼ’",
    "x\x00y\x1c",
    "١٢٣ ½ Ⅷ",
    "\ud800",
    "a\udc00b \ud83d\ude00",
    "def f(x):\n    return x\n",
    "ﬁ Ĳ ẞ",
]
ALPHABET = "abcde  \n.,!?'0189éßΩ日本🎉\ud800\udfff\u0301\u200d"
NO_TEXTS = ["None", "3", "['a']", "b'abc'", "3.5", "{'a': 1}"]
NO_PATHS = ["None", "3", "['x']", "3.5"]


def text(draw: Draw) -> str:
    """The source of a text."""
    if draw.likely(0.5):
        return repr(draw.choice(TEXTS))
    return repr("".join(draw.choices(ALPHABET, k=draw.randint(0, 30))))


def word(draw: Draw) -> str:
    """The source of a text in the alphabet of LETTERS."""
    return repr("".join(draw.choices("abcdefghij", k=draw.randint(1, 4))))


@functools.cache
def tiktoken_gpt2():
    """tiktoken's GPT-2, made from our own files: it would ask the network for its own."""
    import tiktoken

    from tests.fuzz_names import gpt2_tokenizer

    tokenizer = gpt2_tokenizer()
    ranks = {
        text.encode("latin-1"): i
        for i, text in tokenizer.token_text.items()
        if i != tokenizer.eot_token
    }
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


@generator("BPETokenizer.encode", 3)
def encode(draw):
    allowed = draw.choice(["()", "()", "['<|endoftext|>']", "{'<|endoftext|>'}"])

    def right(result, text, allowed_special=()):
        assert all(type(i) is int for i in result)
        expected = tiktoken_gpt2().encode(
            text, allowed_special=set(allowed_special), disallowed_special=()
        )
        assert result == expected, f"tiktoken gives {expected}"

    wrong = {
        "_text": NO_TEXTS,
        "allowed_special": ["['<|pad|>']", "3", "'<|endoftext|>'", "[3]", "None"],
    }
    arguments = {"_text": text(draw), "allowed_special": allowed}
    return Plan(
        "gpt2_tokenizer().encode",
        arguments,
        right,
        wrong,
        alias={"allowed_special": "allowed_special|special"},
    )


@generator("BPETokenizer.decode", 2)
def decode(draw):
    numbers = [draw.randrange(50257) for _ in range(draw.randint(0, 8))]
    source = draw.choice(
        [
            f"{numbers}",
            f"torch.tensor({numbers}, dtype=torch.long)",
            f"tuple({numbers})",
            f"np.array({numbers}, dtype=np.int64)",
        ]
    )

    def right(result, ids):
        assert result == tiktoken_gpt2().decode(list(map(int, ids)))

    wrong = {
        "_ids": [
            "[50257]",
            "[-1]",
            "[[1, 2]]",
            "['a']",
            "None",
            "'abc'",
            "3",
            "[1.5]",
            "torch.tensor([[1, 2]])",
            "torch.tensor([1.0])",
            "[None]",
            "'1'",
        ]
    }
    return Plan(
        "gpt2_tokenizer().decode",
        {"_ids": source},
        right,
        wrong,
        alias={"_ids": r"got|expected|id"},
    )


@generator("BPETokenizer.call")
def call_tokenizer(draw):
    def right(result, text):
        from tests.fuzz_names import gpt2_tokenizer

        tokenizer = gpt2_tokenizer()
        assert result.dtype == torch.long and result.shape == (1, len(tokenizer.encode(text)))
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokenizer.decode(result[0]) == clean

    return Plan("gpt2_tokenizer()", {"_text": text(draw)}, right, {"_text": NO_TEXTS})


@generator("encode_and_show_work")
def show_work(draw):
    def right(result, text):
        parts = result["parts"]
        assert [i for part in parts for i in part["token_ix"]] == result["bpe_idx"]
        assert all(len(part["token_merged"]) == len(part["token_ix"]) for part in parts)

    return Plan(
        "gpt2_tokenizer().encode_and_show_work", {"_text": text(draw)}, right, {"_text": NO_TEXTS}
    )


@generator("BPETokenizer.train", 2)
def train(draw):
    size = draw.choice([257, 258, 262])
    corpus = draw.choice(
        [
            "['the cat sat on the mat'] * 3",
            "['abab', 'baba abab']",
            "('one two', 'two three')",
            "iter(['some text, some more text'])",
            r"['é\ud800é aa aa ab']",
            "['日本日本', 'aaaa bb']",
        ]
    )

    def right(result, texts, vocab_size):
        assert result.vocab_size == vocab_size == len(result.vocab)
        assert result.eot_token == vocab_size - 1
        for line in ("the cat sat", "日本 ab"):
            assert result.decode(result.encode(line)) == line
        from mingpt.bpe import simple_encode

        merges = {(a, b): c for a, b, c in result.merges}
        byte_ids = [result.byte_ids[b] for b in b"cat"]
        assert result.encode("cat") == simple_encode(byte_ids, merges)

    wrong = {
        "texts": ["'text'", "None", "3", "[1, 2]", "[None]", "[b'bytes']", "[['a']]"],
        "vocab_size": ["256", "0", "-1", "257.5", "'300'", "None", "True", "10**9"],
    }
    if size == 257:
        wrong["texts"].remove("[1, 2]")
    arguments = {"texts": corpus, "vocab_size": str(size)}
    return Plan("BPETokenizer.train", arguments, right, wrong, alias={"texts": "text"})


BROKEN_VOCABULARIES = [
    ("vocab.json", "''"),
    ("vocab.json", "'[]'"),
    ("vocab.json", "'{'"),
    ("vocab.json", '\'{"a": "b"}\''),
    ("vocab.json", "'{\"a\": 1}'"),
    ("vocab.json", "'é'.encode('latin-1')"),
    ("vocab.json", "'{}'.encode('utf-16')"),
    ("vocab.json", "'[' * 100000"),
    ("merges.txt", "'a b c'"),
    ("merges.txt", "'\\xff'.encode('latin-1')"),
    ("merges.txt", "'a zzzz'"),
    ("merges.txt", "'x'"),
    ("merges.txt", "b'\\xff\\xfea\\x00'"),
    ("vocab.json", "json.dumps(small_bpe().vocab | {'日本': 999})"),
    ("vocab.json", "json.dumps(small_bpe().vocab | {'zz': 1.5})"),
    ("vocab.json", "json.dumps(small_bpe().vocab | {'zz': True})"),
    ("vocab.json", "json.dumps(small_bpe().vocab | {'zz': 0})"),
    ("vocab.json", "json.dumps(small_bpe().vocab | {'zz': -5})"),
]


@generator("BPETokenizer.from_pretrained", 2)
def load_tokenizer(draw):
    name, content = draw.choice(BROKEN_VOCABULARIES)
    setup = [
        "small_bpe().save_pretrained(FOLDER / 'good')",
        "small_bpe().save_pretrained(FOLDER / 'bad')",
        f"write('bad/{name}', {content})",
    ]

    def right(result, folder):
        from tests.fuzz_names import small_bpe

        assert result.vocab == small_bpe().vocab
        for line in ("the cat sat there", "日本 ab"):
            assert result.encode(line) == small_bpe().encode(line)

    wrong = [
        "FOLDER / 'bad'",
        "FOLDER / 'bad'",
        "FOLDER / 'bad'",
        "FOLDER / 'missing'",
        "FOLDER / 'good' / 'vocab.json'",
        "'x' * 5000",
        *NO_PATHS,
    ]
    return Plan(
        "BPETokenizer.from_pretrained",
        {"_folder": draw.choice(["FOLDER / 'good'", "str(FOLDER / 'good')"])},
        right,
        {"_folder": wrong},
        setup,
        {"_folder": "fuzz-|folder|path|vocabular|tokens|merges"},
    )


@generator("BPETokenizer")
def make_tokenizer(draw):
    def right(result, vocab, merges):
        assert result.vocab_size == len(vocab)

    wrong = {
        "vocab": [
            "None",
            "{}",
            "{'a': 1}",
            "[]",
            "'vocab'",
            "3",
            "small_bpe().vocab | {'日': 500}",
            "small_bpe().vocab | {3: 500}",
            "small_bpe().vocab | {'zz': 'x'}",
            "small_bpe().vocab | {'zz': 0}",
        ],
        "merges": [
            "None",
            "[('a', 'zzz')]",
            "['ab']",
            "3",
            "[('a', 'b', 'c')]",
            "[(1, 2)]",
            "'ab'",
            "[None]",
        ],
    }
    arguments = {"vocab": "small_bpe().vocab", "merges": "small_bpe().merge_list"}
    return Plan(
        "BPETokenizer", arguments, right, wrong, alias={"vocab": "vocab|token", "merges": "merges"}
    )


# --------------------------------------------------------------------------------------------------
# Characters


@generator("CharTokenizer.encode")
def chars_encode(draw):
    def right(result, text):
        assert result == ["abcdefghij".index(char) for char in text]

    wrong = {"_text": ["'xyz'", r"'\ud800'", *NO_TEXTS]}
    return Plan(
        "LETTERS.encode", {"_text": word(draw)}, right, wrong, alias={"_text": "character|text"}
    )


@generator("CharTokenizer.decode")
def chars_decode(draw):
    numbers = [draw.randrange(10) for _ in range(draw.randint(0, 6))]
    source = draw.choice([f"{numbers}", f"torch.tensor({numbers}, dtype=torch.long)"])

    def right(result, ids):
        assert result == "".join("abcdefghij"[int(i)] for i in ids)

    wrong = {
        "_ids": [
            "[11]",
            "[-1]",
            "[[1]]",
            "['a']",
            "None",
            "3",
            "[1.5]",
            "'abc'",
            "torch.tensor([[1, 2]])",
            "torch.tensor([1.0])",
            "[None]",
        ]
    }
    return Plan("LETTERS.decode", {"_ids": source}, right, wrong, alias={"_ids": "id|vocabulary"})


@generator("CharTokenizer")
def make_chars(draw):
    def right(result, chars):
        assert result.vocab_size == len(chars) + 1

    wrong = {
        "_chars": ["'aa'", "['ab']", "[1, 2]", "None", "3", "['']", "[None]", "b'ab'", "{'a': 1}"]
    }
    return Plan(
        "CharTokenizer",
        {"_chars": draw.choice(["'abc'", "['x', 'y']", "tuple('ab')"])},
        right,
        wrong,
        alias={"_chars": "char"},
    )


@generator("CharTokenizer.train")
def train_chars(draw):
    def right(result, texts, min_count):
        joined = "".join(texts)
        frequent = {c for c in joined if joined.count(c) >= min_count} | {"\ufffd"}
        assert result.chars == sorted(frequent)

    wrong = {
        "texts": ["None", "3", "[1]", "[None]", "'text'", "[b'x']", "[['a']]"],
        "min_count": ["'1'", "None", "0", "-1", "1.5", "math.nan", "True"],
    }
    arguments = {
        "texts": draw.choice(["['abc', 'abd']", "('hello',)", "['日本', '']"]),
        "min_count": draw.choice(["1", "2"]),
    }
    return Plan("CharTokenizer.train", arguments, right, wrong, alias={"texts": "text"})


@generator("CharTokenizer.from_pretrained")
def load_chars(draw):
    content = draw.choice(
        [
            "''",
            "'{}'",
            "'[1]'",
            "'[\"ab\"]'",
            '\'["a", "a"]\'',
            "'['",
            "'null'",
            "'[\"é\"]'.encode('latin-1')",
            "'[]'.encode('utf-16')",
            "'[' * 100000",
        ]
    )
    setup = [
        "CharTokenizer('abc').save_pretrained(FOLDER / 'good')",
        f"write('bad/chars.json', {content})",
    ]

    def right(result, folder):
        assert result.chars == ["a", "b", "c"]

    wrong = ["FOLDER / 'bad'", "FOLDER / 'bad'", "FOLDER / 'missing'", *NO_PATHS]
    return Plan(
        "CharTokenizer.from_pretrained",
        {"_folder": "FOLDER / 'good'"},
        right,
        {"_folder": wrong},
        setup,
        {"_folder": "fuzz-|chars|path|folder"},
    )


# --------------------------------------------------------------------------------------------------
# Files and rows


BROKEN_TEXT_FILES = [
    "'é'.encode('latin-1')",
    "'text'.encode('utf-16')",
    "b'\\xff\\xfe\\x00'",
    "b'a\\x80'",
    r"b'\xed\xa0\x80'",
]


@generator("read_text")
def read_text(draw):
    content = draw.choice(["plain", "", "two\r\nlines\r", "\ufeffmark", "日本 🎉"])
    setup = [
        f"write('good.txt', {content!r})",
        f"write('bad.txt', {draw.choice(BROKEN_TEXT_FILES)})",
    ]

    def right(result, path):
        expected = content.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        assert result == expected

    wrong = [
        "FOLDER / 'bad.txt'",
        "FOLDER / 'bad.txt'",
        "FOLDER / 'missing.txt'",
        "FOLDER",
        *NO_PATHS,
        "'\\0'",
        "'x' * 5000",
    ]
    return Plan(
        "datasets_read_text",
        {"_path": "FOLDER / 'good.txt'"},
        right,
        {"_path": wrong},
        setup,
        {"_path": "fuzz-|path|file"},
    )


BROKEN_LINES = [
    "'{'",
    "'[1]'",
    "'null'",
    "'3'",
    "'{\"text\": 3}'",
    '\'{"other": "x"}\'',
    "'{\"text\": null}'",
    '\'{"text": ["a"]}\'',
    "'é'.encode('latin-1')",
    "'{}'.encode('utf-16')",
    "'{\"text\": \"é\"}'.encode('latin-1')",
    "'{\"text\": \"x\"}'.encode('utf-16')",
    '\'{"text": "a"} {"text": "b"}\'',
    "'[' * 100000",
    "'{\"a\":' * 100000",
    '\'{"text": {"text": "a"}}\'',
    "'{\"text\": ' + '9' * 5000 + '}'",
    "b'\\x00'",
]


@generator("read_jsonl", 2)
def read_jsonl(draw):
    n = draw.randint(0, 4)
    rows = [{"text": draw.choice(["a", "日本", "x\u2028y", "\n"]), "n": i} for i in range(n)]
    ascii_only = draw.likely(0.5)
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    content = "\n".join(lines) + draw.choice(["", "\n", "\n\n"])
    good_line = '{"text": "good"}\n' if draw.likely(0.5) else ""
    bad = draw.choice(BROKEN_LINES)
    setup = [
        f"write('good.jsonl', {content!r})",
        f"bad = {bad}",
        "bad = bad.encode() if isinstance(bad, str) else bad",
        f"write('bad.jsonl', {good_line.encode()!r} + bad)",
    ]

    def right(result, path, field):
        assert result == rows

    wrong = {
        "_1path": [
            "FOLDER / 'bad.jsonl'",
            "FOLDER / 'bad.jsonl'",
            "FOLDER / 'bad.jsonl'",
            "FOLDER / 'no.jsonl'",
            "FOLDER",
            *NO_PATHS,
        ],
    }
    arguments = {"_1path": "FOLDER / 'good.jsonl'", "_2field": "'text'"}

    def checked(result, **values):
        right(result, None, None)

    return Plan("read_jsonl", arguments, checked, wrong, setup, {"_1path": "fuzz-|path"})


@generator("split_of")
def split_of(draw):
    def right(result, text):
        import hashlib

        content = text.encode("utf-8", "surrogatepass")
        number = int(hashlib.sha256(content).hexdigest()[:16], 16) % 20
        assert result == {0: "test", 1: "valid"}.get(number, "train")

    return Plan("split_of", {"_text": text(draw)}, right, {"_text": NO_TEXTS})


@generator("split_rows")
def split_rows(draw):
    texts = [draw.choice(TEXTS) for _ in range(draw.randint(0, 6))]

    def right(result, rows, key):
        assert sorted(result) == ["test", "train", "valid"]
        assert sum(map(len, result.values())) == len(rows)

    wrong = {
        "rows": [
            "None",
            "3",
            "[{'text': 3}]",
            "[{}]",
            "['a']",
            "[None]",
            "[{'t': 'x'}]",
            "'abc'",
            "{'text': 'x'}",
        ],
        "key": ["'missing'", "None", "3"],
    }
    arguments = {"rows": f"{[{'text': t} for t in texts]!r}", "key": "'text'"}
    if not texts:
        wrong.pop("key")
    return Plan(
        "split_rows", arguments, right, wrong, alias={"key": "field|row|key", "rows": "row"}
    )


# Wrong rows, in the terms of each dataset's fields: {field} stands for one of them.
def wrong_rows(good: str, *fields: str) -> list[str]:
    """Lists of rows with one that is wrong: `good` is the source of a right one."""
    wrong = [
        "None",
        "3",
        "'text'",
        "['text']",
        "[None]",
        "[3]",
        "[[1, 2]]",
        "[{}]",
        f"[{good}, None]",
        f"[{good}, 'x']",
        "{'prompt': 'a'}",
        "[b'x']",
    ]
    for field in fields:
        for value in (
            "None",
            "3",
            "['a', 3]",
            "{'role': 'user'}",
            "b'abc'",
            "True",
            "[[['a']]]",
            "math.nan",
        ):
            wrong.append(f"[{good}, {{**{good}, {field!r}: {value}}}]")
        wrong.append(f"[{good}, {{k: v for k, v in {good}.items() if k != {field!r}}}]")
        wrong.append(f"[{{**{good}, {field!r}: 'a' * 500}}]")
    return wrong


@generator("Completions", 2)
def completions(draw):
    rows = [
        {"prompt": eval(word(draw)), "completion": eval(word(draw))}
        for _ in range(draw.randint(1, 4))
    ]
    if draw.likely(0.3):
        rows = [{"text": row["completion"]} for row in rows]
    elif draw.likely(0.3):
        rows = [{"completion": row["completion"]} for row in rows]

    def right(result, rows, tokenizer, block_size):
        for (x, y), row in zip(result, rows, strict=True):
            prompt = tokenizer.encode(row.get("prompt", "")) or [10]
            answer = [*tokenizer.encode(row.get("completion", row.get("text"))), 10]
            ids = prompt + answer
            assert x.tolist() == ids[:-1]
            assert y.tolist() == [-1] * (len(prompt) - 1) + answer
        idx, targets = result.collate([result[i] for i in range(len(result))])
        assert idx.shape == targets.shape
        assert result.weight((idx, targets)) == int((targets >= 0).sum())

    good = "{'prompt': 'ab', 'completion': 'cd'}"
    wrong_prompts = wrong_rows(good, "prompt")
    wrong_prompts = [
        w
        for w in wrong_prompts
        if not w.endswith(" if k != 'prompt'}]") and "'prompt': None" not in w
    ]
    wrong = {
        "rows": [
            *wrong_rows(good, "completion"),
            *wrong_prompts,
            "[{'prompt': 'a'}]",
            "[{'completion': 'xyz'}]",
            r"[{'completion': '\ud800'}]",
        ],
        "tokenizer": ["None", "BareTokenizer()", "3", "'gpt2'", "CharTokenizer"],
        "block_size": ["1", "0", "None", "'12'", "-3", "math.nan", "12.5", "True"],
    }
    arguments = {"rows": repr(rows), "tokenizer": "LETTERS", "block_size": "12"}
    alias = {
        "rows": "row|text|character",
        "tokenizer": "tokenizer|end token|encode",
        "block_size": "row|block_size",
    }
    return Plan("Completions", arguments, right, wrong, alias=alias)


@generator("Comparisons", 2)
def comparisons(draw):
    K = draw.randint(1, 3)
    rows = []
    for _ in range(draw.randint(1, 4)):
        rejected = [eval(word(draw)) for _ in range(K)]
        row = {"prompt": eval(word(draw)), "chosen": eval(word(draw)), "rejected": rejected}
        if K == 1 and draw.likely(0.5):
            row["rejected"] = rejected[0]
        if draw.likely(0.3):
            row["ended"] = [draw.likely(0.5) for _ in range(K + 1)]
        rows.append(row)

    def right(result, rows, tokenizer, block_size):
        idx, attention_mask, completion_mask = result.collate([result[i] for i in range(len(rows))])
        assert idx.shape == attention_mask.shape == completion_mask.shape
        for b, row in enumerate(rows):
            rejected = row["rejected"]
            texts = [row["chosen"], *([rejected] if isinstance(rejected, str) else rejected)]
            ended = row.get("ended", [True] * len(texts))
            for k, (answer, end) in enumerate(zip(texts, ended, strict=True)):
                ids = tokenizer.encode(answer) + [10] * end
                assert idx[b, k][completion_mask[b, k]].tolist() == ids
                both = tokenizer.encode(row["prompt"]) + ids
                assert idx[b, k][attention_mask[b, k]].tolist() == both

    good = "{'prompt': 'ab', 'chosen': 'cd', 'rejected': 'ef'}"
    wrong = {
        "rows": [
            *wrong_rows(good, "chosen", "rejected"),
            f"[{{**{good}, 'ended': [1, 0]}}]",
            f"[{{**{good}, 'ended': 'yes'}}]",
            f"[{{**{good}, 'ended': [True]}}]",
            f"[{{**{good}, 'ended': None}}]",
            f"[{{**{good}, 'rejected': []}}]",
            f"[{good}, {{**{good}, 'rejected': ['a', 'b']}}]",
            f"[{{**{good}, 'chosen': '', 'ended': [False, True]}}]",
            f"[{{**{good}, 'rejected': 'xyz'}}]",
            f"[{{**{good}, 'prompt': 3}}]",
        ],
        "tokenizer": ["None", "BareTokenizer()", "3", "'gpt2'"],
        "block_size": ["1", "0", "None", "'12'", "-3", "math.nan", "12.5"],
    }
    arguments = {"rows": repr(rows), "tokenizer": "LETTERS", "block_size": "12"}
    alias = {
        "rows": "row|text|character",
        "tokenizer": "tokenizer|end token|encode",
        "block_size": "row|block_size",
    }
    return Plan("Comparisons", arguments, right, wrong, alias=alias)


@generator("Prompts", 2)
def prompts(draw):
    kind = draw.choice(["text", "ids", "tensor", "rows"])
    n = draw.randint(1, 4)
    texts = [eval(word(draw)) for _ in range(n)]
    encoded = [["abcdefghij".index(c) for c in t] for t in texts]
    sources = {
        "text": repr(texts),
        "ids": repr(encoded),
        "tensor": draw.ids(n, 3),
        "rows": repr([{"prompt": t, "answer": i} for i, t in enumerate(texts)]),
    }

    def right(result, prompts, tokenizer):
        assert len(result) == n
        expected = prompts.tolist() if kind == "tensor" else encoded
        assert [x.tolist() for x in result.ids] == expected
        if kind == "rows":
            assert result.columns == {"answer": list(range(n))}
        idx, mask, index = result.collate([result[i] for i in range(n)])
        assert [row[m].tolist() for row, m in zip(idx, mask, strict=True)] == expected
        assert index.tolist() == list(range(n))

    wrong = {
        "prompts": [
            "None",
            "3",
            "'abc'",
            "{'prompt': 'a'}",
            "[3]",
            "[None]",
            "[[]]",
            "['']",
            "[[1.9, 2.2]]",
            "[[True]]",
            "[['a']]",
            "[{}]",
            "[{'prompt': 3}]",
            "[{'prompt': None}]",
            "[b'ab']",
            "[{'prompt': 'a', 'x': 1}, {'prompt': 'b'}]",
            "[{'prompt': 'a'}, {'prompt': 'b', 'x': 1}]",
            "[{'prompt': 'a', 'completions': 1}]",
            "[{'prompt': 'a', 3: 1}]",
            "[[1], [1.5]]",
            "torch.ones(2, 3)",
            "torch.ones(2, 2, 2).long()",
            "[[[1]]]",
            "['xyz']",
            r"['\ud800']",
            "torch.tensor(3)",
            "[[1, 'a']]",
            "[[10**30]]",
            "[{'a': 1}]",
        ],
    }
    if kind in ("text", "rows"):
        wrong["tokenizer"] = ["None", "3", "'gpt2'"]
    arguments = {"prompts": sources[kind], "tokenizer": "LETTERS"}
    alias = {"prompts": "prompt|row|character", "tokenizer": "tokenizer|encode"}
    return Plan("Prompts", arguments, right, wrong, alias=alias)


@generator("pad")
def pad(draw):
    left = draw.choice(["True", "False"])
    rows = [draw.ids(draw.randint(1, 5)) for _ in range(draw.randint(1, 4))]

    def right(result, rows, left):
        idx, mask = result
        T = max(map(len, rows))
        for row, out, bits in zip(rows, idx, mask, strict=True):
            space = [0] * (T - len(row))
            assert out.tolist() == (space + row.tolist() if left else row.tolist() + space)
            ones = [True] * len(row)
            no = [False] * (T - len(row))
            assert bits.tolist() == (no + ones if left else ones + no)

    wrong = {
        "rows": [
            "None",
            "[]",
            "[[1, 2]]",
            "3",
            "'ab'",
            "[None]",
            "[torch.ones(2, 2)]",
            "[torch.tensor(3)]",
        ]
    }
    arguments = {"rows": f"[{', '.join(rows)}]", "left": left}
    return Plan("pad_and_mask", arguments, right, wrong, alias={"rows": "row"})


@generator("end_token")
def end_token(draw):
    def right(result, tokenizer):
        assert result == {"Letters": 10, "BareTokenizer": None, "NoneType": None}.get(
            type(tokenizer).__name__, 7
        )

    good = draw.choice(
        [
            "LETTERS",
            "BareTokenizer()",
            "None",
            "type('T', (), {'eos_token_id': 7})()",
            "type('T', (), {'eot_token': None, 'eos_token_id': np.int64(7)})()",
        ]
    )
    wrong = [
        "type('T', (), {'eot_token': 'x'})()",
        "type('T', (), {'eos_token_id': [1]})()",
        "type('T', (), {'eos_token_id': 1.5})()",
        "type('T', (), {'eot_token': -1})()",
    ]
    return Plan(
        "end_token",
        {"_tokenizer": good},
        right,
        {"_tokenizer": wrong},
        alias={"_tokenizer": "eot_token|eos_token_id"},
    )
