"""The Llama family, adapters, and conversations."""

import math

import torch
from torch.nn import functional as F

from tests.fuzz import Draw, Plan, generator
from tests.fuzz_calls.models import IDX, LONG, MASK, WRONG_IDS, masks, wrong_masks
from tests.fuzz_calls.numbers import close

KINDS = [
    "{}",
    "{'n_kv_head': 1}",
    "{'n_kv_head': 2, 'attention_bias': True}",
    "{'query_key_norm': True, 'head_size': 6}",
    "{'sliding_window': 3, 'rope_theta': 500.0}",
    "{'tie_weights': False, 'n_inner': 20, 'norm_eps': 1e-6}",
]


def llama_row(config, weights, ids):
    """The logits (T, V) of one row of a Llama in float64, head by head."""
    C, size = config.n_embd, config.head_size
    share = config.n_head // config.n_kv_head

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weights[name]

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def turned(x):
        """Rotate pairs of channels, half a head apart, by the position times their frequency."""
        half = size // 2
        speed = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * speed
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    x = weights["embed_tokens.weight"][ids]
    T = len(ids)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (distance < 0) | (distance >= (config.sliding_window or T))
    for i in range(config.n_layer):
        block = f"layers.{i}."
        h = norm(x, f"{block}input_layernorm.weight")
        q, k, v = (linear(h, f"{block}self_attn.{name}_proj") for name in "qkv")
        heads = []
        for n in range(config.n_head):
            at = slice(n * size, (n + 1) * size)
            group = slice(n // share * size, (n // share + 1) * size)
            query, key = q[:, at], k[:, group]
            if config.query_key_norm:
                query = norm(query, f"{block}self_attn.q_norm.weight")
                key = norm(key, f"{block}self_attn.k_norm.weight")
            scores = turned(query) @ turned(key).t() / math.sqrt(size)
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(1) @ v[:, group])
        x = x + linear(torch.cat(heads, 1), f"{block}self_attn.o_proj")
        h = norm(x, f"{block}post_attention_layernorm.weight")
        gate = F.silu(linear(h, f"{block}mlp.gate_proj"))
        x = x + linear(gate * linear(h, f"{block}mlp.up_proj"), f"{block}mlp.down_proj")
    assert x.shape == (T, C)
    return norm(x, "norm.weight") @ weights["lm_head"].t()


@generator("Llama.forward", 3)
def llama_forward(draw):
    B, T = draw.randint(1, 3), draw.randint(1, 12)
    kind = draw.choice(KINDS)

    def right(result, idx, attention_mask):
        from tests.fuzz_names import llama

        model = llama(**eval(kind))
        weights = {
            name.removeprefix("transformer."): p.double() for name, p in model.state_dict().items()
        }
        weights["lm_head"] = weights["lm_head.weight"]
        for b in range(B):
            real = range(T) if attention_mask is None else attention_mask[b].nonzero()[:, 0]
            columns = [int(t) for t in real]
            expected = llama_row(model.config, weights, idx[b, columns])
            close(result[0][b, columns], expected, 1e-3)

    arguments = {"idx": draw.ids(B, T), "attention_mask": masks(draw, B, T)}
    wrong = {"idx": [*WRONG_IDS, LONG], "attention_mask": wrong_masks(B, T)}
    alias = {"idx": IDX, "attention_mask": MASK}
    return Plan(f"llama(**{kind})", arguments, right, wrong, alias=alias)


@generator("Llama.generate", 2)
def llama_generate(draw):
    """Greedily and with a cache, the tokens are those that the logits of the whole row name."""
    B, T, n = draw.randint(1, 3), draw.randint(1, 6), draw.randint(1, 5)
    kind = draw.choice(KINDS)

    def right(result, idx, max_new_tokens, attention_mask):
        from tests.fuzz_names import llama

        model = llama(**eval(kind))
        for b in range(B):
            real = range(T) if attention_mask is None else attention_mask[b].nonzero()[:, 0]
            row = idx[b, [int(t) for t in real]]
            for token in result[b, T:]:
                logits = model(row[None])[0][0, -1]
                assert logits[token] > logits.max() - 1e-3, "not the likeliest token"
                row = torch.cat([row, token[None]])

    arguments = {
        "idx": draw.ids(B, T),
        "max_new_tokens": str(n),
        "attention_mask": masks(draw, B, T),
    }
    wrong = {
        "idx": [*WRONG_IDS, LONG],
        "max_new_tokens": ["0", "99", "None", "'3'", "1.5"],
        "attention_mask": wrong_masks(B, T),
    }
    alias = {"idx": IDX, "attention_mask": MASK, "max_new_tokens": "max_new_tokens|new ones"}
    return Plan(f"llama(**{kind}).generate", arguments, right, wrong, alias=alias)


@generator("Llama", 2)
def make_llama(draw):
    arguments = {
        "architecture": "'llama'",
        "n_layer": "1",
        "n_head": "4",
        "n_embd": draw.choice(["16", "32"]),
        "vocab_size": "11",
        "block_size": "12",
        "n_kv_head": draw.choice(["None", "1", "2", "4"]),
        "n_inner": draw.choice(["None", "24"]),
        "head_size": draw.choice(["None", "2", "8"]),
        "rope_theta": draw.choice(["None", "500.0", "1e6"]),
        "rope_scaling": draw.choice(
            ["None", "{'rope_type': 'linear', 'factor': 2.0}", "{'rope_type': 'default'}"]
        ),
        "norm_eps": draw.choice(["None", "1e-6"]),
        "query_key_norm": draw.choice(["None", "True", "False"]),
        "sliding_window": draw.choice(["None", "4"]),
    }

    def right(result, **options):
        assert type(result.transformer).__name__ == "LlamaTransformer"
        assert result.config.n_kv_head == (options["n_kv_head"] or 4)

    wrong = {
        "architecture": ["'gpt3'", "None", "'Llama'", "3", "['llama']"],
        "n_kv_head": ["0", "3", "'2'", "1.5", "8", "True"],
        "n_inner": ["0", "-1", "'x'", "2.5"],
        "head_size": ["0", "3", "'x'", "2.5"],
        "rope_theta": ["0", "-1", "'x'", "math.nan", "math.inf"],
        "rope_scaling": [
            "3",
            "'linear'",
            "[]",
            "{'rope_type': 'magic'}",
            "{'rope_type': 'linear'}",
            "{'rope_type': 'linear', 'factor': 'x'}",
            "{'rope_type': 'linear', 'factor': 0}",
            "{'rope_type': 'linear', 'factor': math.nan}",
            "{'rope_type': []}",
            "{}",
        ],
        "norm_eps": ["-1", "'x'", "2", "math.nan"],
        "attention_bias": ["'x'", "1"],
        "output_bias": ["'x'", "True"],
        "query_key_norm": ["'x'", "2"],
        "sliding_window": ["0", "'x'", "1.5", "-3"],
        "n_layers": ["2"],
    }
    function = "(lambda **o: GPT(options(GPT.get_default_config, **o)))"
    alias = {"architecture": "architecture", "rope_scaling": "rope_scaling|factor"}
    return Plan(function, arguments, right, wrong, alias=alias)


@generator("GPT-2 with Llama's options")
def foreign_options(draw):
    sizes = {"n_layer": "1", "n_head": "2", "n_embd": "16", "vocab_size": "11", "block_size": "12"}
    wrong = {
        "n_kv_head": ["1", "2"],
        "n_inner": ["64"],
        "head_size": ["8"],
        "rope_theta": ["10000.0"],
        "rope_scaling": ["{'rope_type': 'default'}"],
        "norm_eps": ["1e-5"],
        "attention_bias": ["True", "False"],
        "query_key_norm": ["False"],
        "sliding_window": ["4"],
    }
    function = "(lambda **o: GPT(options(GPT.get_default_config, **o)))"
    return Plan(function, sizes, lambda result, **rest: None, wrong)


# --------------------------------------------------------------------------------------------------
# Adapters


def model_source(draw: Draw) -> str:
    """A model of its own of either family."""
    return draw.choice(["new_gpt(1)", "new_llama()"])


@generator("lora.add", 2)
def add_adapter(draw):
    rank = draw.randint(1, 4)

    def right(result, model, rank, **rest):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert result == sum(p.numel() for p in trained.values())
        assert all(".adapters." in name for name in trained)
        # A fresh adapter changes nothing.
        from tests.fuzz_names import ids, lora

        idx = ids(1, (2, 5))
        with lora.disabled(model):
            base = model(idx)[0]
        assert torch.equal(model(idx)[0], base)

    wrong = {
        "model": ["None", "'gpt2'", "nn.Linear(2, 2)", "3", "gpt(1).transformer", "GPT"],
        "rank": ["0", "-1", "1.5", "'8'", "None", "True", "math.nan"],
        "alpha": ["-1", "'x'", "None", "math.nan", "0"],
        "dropout": ["-0.1", "1.0", "'x'", "None", "math.nan"],
        "layers": ["[]", "['no_such']", "'attn'", "3", "[3]", "[None]", "['']"],
        "name": ["''", "'a.b'", "None", "3", "'a b'", "['x']"],
    }
    arguments = {
        "model": model_source(draw),
        "rank": str(rank),
        "alpha": draw.choice(["16", "1.0", "np.float64(2)"]),
        "dropout": draw.choice(["0.0", "0"]),
        "name": draw.choice(["'default'", "'value'", "'a_1'"]),
    }
    alias = {"layers": "layer", "model": "model|trunk|GPT"}
    return Plan("lora.add", arguments, right, wrong, alias=alias)


@generator("lora.merge")
def merge_adapter(draw):
    setup = [
        f"model = {model_source(draw)}",
        "lora.add(model, rank=2)",
        "utils.set_seed(1)",
        "[p.data.normal_(std=0.1) for p in model.parameters() if p.requires_grad]",
        "expected = model(ids(1, (2, 5)))[0].detach()",
    ]
    wrong = ["None", "gpt(1)", "'x'", "nn.Linear(2, 2)", "3"]

    def right(result, model):
        from tests.fuzz_names import ids

        assert not any(".adapters" in name for name, _ in model.named_parameters())
        assert all(p.requires_grad for p in model.parameters())
        assert torch.isfinite(model(ids(1, (2, 5)))[0]).all()

    alias = {"_model": "model|adapter|trunk"}
    return Plan("lora.merge", {"_model": "model"}, right, {"_model": wrong}, setup, alias)


@generator("lora.load", 2)
def load_adapter(draw):
    model = model_source(draw)
    broken = draw.choice(
        [
            "write('bad/adapter_config.json', '{}')",
            "write('bad/adapter_config.json', '[')",
            "write('bad/adapter_config.json', '{\"r\": \"x\"}')",
            'write(\'bad/adapter_config.json\', \'{"r": 2, "peft_type": "LOHA"}\')',
            "write('bad/adapter_config.json', '{\"r\": 2, \"use_dora\": true}')",
            "write('bad/adapter_config.json', '{\"r\": 3}')",
            "write('bad/adapter_config.json', '{\"r\": [], \"peft_type\": []}')",
            "write('bad/adapter_model.safetensors', b'')",
            "write('bad/adapter_model.safetensors', b'junk')",
            "(FOLDER / 'bad' / 'adapter_model.safetensors').unlink()",
            "(FOLDER / 'bad' / 'adapter_config.json').unlink()",
        ]
    )
    setup = [
        f"model = {model}",
        "lora.add(model, rank=2)",
        "utils.set_seed(1)",
        "[p.data.normal_(std=0.1) for p in model.parameters() if p.requires_grad]",
        "lora.save_pretrained(model, FOLDER / 'good')",
        "lora.save_pretrained(model, FOLDER / 'bad')",
        broken,
        "trained = model(ids(1, (2, 5)))[0].detach()",
    ]

    def right(result, model, folder):
        from tests.fuzz_names import ids, lora

        own = dict(model.named_parameters())
        assert result == sum(p.numel() for p in own.values() if p.requires_grad)
        idx = ids(1, (2, 5))
        with lora.disabled(model):
            assert not torch.equal(model(idx)[0], model.eval()(idx)[0] * 0)

    wrong = {
        "_1model": ["None", "'x'", "3", "new_gpt(1, n_embd=8)", "nn.Linear(2, 2)"],
        "_2folder": [
            "FOLDER / 'bad'",
            "FOLDER / 'bad'",
            "FOLDER / 'no'",
            "None",
            "3",
            "'x' * 5000",
        ],
    }
    arguments = {"_1model": model, "_2folder": "FOLDER / 'good'"}
    alias = {"_1model": "model|trunk|fuzz-", "_2folder": "fuzz-|path|x{20}"}
    return Plan("lora.load", arguments, right, wrong, setup, alias)


# --------------------------------------------------------------------------------------------------
# Conversations


def conversation(draw: Draw) -> list[dict]:
    """Some messages."""
    contents = ["Hi!", "", "the cat", "<|im_end|>", "é 日本", "a\nb", "<|endoftext|>", "<|im_"]
    roles = ["user", "assistant"] * draw.randint(1, 3)
    return [{"role": role, "content": draw.choice(contents)} for role in roles]


@generator("Chat.encode", 2)
def encode_chat(draw):
    messages = conversation(draw)

    def right(result, messages, add_generation_prompt, return_mask):
        from tests.fuzz_names import small_bpe

        ids, mask = result if return_mask else (result, None)
        # CHATML's markers are text for this tokenizer, which does not know them.
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + (
            "<|im_start|>assistant\n" if add_generation_prompt else ""
        )
        assert small_bpe().decode(ids) == text
        assert small_bpe().eot_token not in ids, "a special token came in through a message"
        if mask is not None:
            assert len(mask) == len(ids)

    wrong = {
        "_messages": [
            "None",
            "3",
            "[]",
            "[None]",
            "['text']",
            "{}",
            "{'role': 'user', 'content': 'x'}",
            "[{}]",
            "[{'role': 'user'}]",
            "[{'content': 'x'}]",
            "[{'role': 3, 'content': 'x'}]",
            "[{'role': 'user', 'content': 3}]",
            "[{'role': 'user', 'content': None}]",
            "[{'role': 'user', 'content': b'x'}]",
            "[{'role': 'user', 'content': ['x']}]",
            "[{'role': None, 'content': 'x'}]",
            "[[1, 2]]",
            "b'text'",
        ],
        "add_generation_prompt": ["'False'", "None", "2"],
        "return_mask": ["'False'", "None", "2"],
    }
    arguments = {
        "_messages": repr(messages),
        "add_generation_prompt": draw.choice(["True", "False"]),
        "return_mask": draw.choice(["True", "False"]),
    }
    alias = {"_messages": "message|got|role|content"}
    return Plan("chat()", arguments, right, wrong, alias=alias)


@generator("Chat")
def make_chat(draw):
    wrong = {
        "tokenizer": ["None", "3", "'gpt2'", "nn.Linear(2, 2)"],
        "template": ["None", "3", "['x']"],
    }
    arguments = {"tokenizer": "small_bpe()", "template": "CHATML"}
    alias = {"template": "template", "tokenizer": "tokenizer"}
    return Plan("Chat", arguments, lambda result, **rest: None, wrong, alias=alias)
