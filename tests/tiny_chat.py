"""A tiny random chat model on the disk, of the Llama family: for the tests of projects/chat.

It has a token for each byte, and three special ones. It writes nonsense, but its files are like
those of a real model: weights, tokenizer and template.
"""

from pathlib import Path

from mingpt.bpe import bytes_to_unicode
from mingpt.chat import CHATML
from mingpt.checkpoint import to_json, write_text
from tests.common import tiny_gpt

START, END, END_OF_TEXT = 256, 257, 258  # behind the 256 bytes
SPECIAL = {START: "<|im_start|>", END: "<|im_end|>", END_OF_TEXT: "<|endoftext|>"}


def tokenizer_json():
    """A byte-level BPE without merges, as the package `tokenizers` writes it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [
        {
            "id": id,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for id, content in SPECIAL.items()
    ]
    alphabet = bytes_to_unicode()
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {alphabet[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def write_tiny_chat(folder, seed=0, **options):
    """Write the model's files, and return the folder's name."""
    folder = Path(folder)
    options = {
        "architecture": "llama",
        "vocab_size": 259,
        "block_size": 256,
        "n_kv_head": 1,
        **options,
    }
    tiny_gpt(seed, **options).save_pretrained(folder)
    write_text(folder / "tokenizer.json", to_json(tokenizer_json()))
    names = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    write_text(folder / "tokenizer_config.json", to_json(names))
    write_text(folder / "chat_template.jinja", CHATML)
    return str(folder)
