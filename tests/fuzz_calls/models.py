"""Models: options, logits, generation, heads, and weights in files of many kinds."""

import math

import torch
from torch.nn import functional as F

from tests.fuzz import Draw, Plan, generator
from tests.fuzz_calls.numbers import close
from tests.fuzz_names import VOCAB

WRONG_IDS = [
    "[[1, 2]]",
    "None",
    "'hello'",
    "[1, 2]",
    "floats(1, (2, 3))",
    "torch.tensor([[1.9, 2.2]])",
    "torch.tensor([1, 2])",
    f"torch.tensor([[1, {VOCAB}]])",
    "torch.tensor([[-1, 2]])",
    "torch.tensor([[1, -100]])",
    "torch.zeros(1, 2, 3).long()",
    "torch.tensor(3)",
    "torch.tensor([[True, False]])",
    "np.array([[1, 2]])",
]
LONG = "ids(1, (2, 40), 11)"  # longer than block_size and one more


def double_logits(model, idx, attention_mask=None):
    """The logits of a GPT in float64, one row at a time, without its padding: {(b, t): (V,)}."""
    weights = {name: p.double() for name, p in model.state_dict().items()}
    logits = {}
    for b, row in enumerate(idx):
        real = range(len(row)) if attention_mask is None else attention_mask[b].nonzero()[:, 0]
        columns = [int(t) for t in real]
        if columns:
            out = one_row(model.config, weights, row[columns])
            logits |= {(b, t): out[i] for i, t in enumerate(columns)}
    return logits


def one_row(config, weights, ids):
    """The logits (T, V) of one row, by loops over heads."""
    prefix = "transformer."
    x = weights[prefix + "wte.weight"][ids] + weights[prefix + "wpe.weight"][: len(ids)]
    size = config.n_embd // config.n_head
    for i in range(config.n_layer):
        block = {name.removeprefix(f"{prefix}h.{i}."): w for name, w in weights.items()}
        h = F.layer_norm(x, (config.n_embd,), block["ln_1.weight"], block["ln_1.bias"])
        q, k, v = F.linear(h, block["attn.c_attn.weight"], block["attn.c_attn.bias"]).chunk(3, 1)
        heads = []
        for n in range(config.n_head):
            at = slice(n * size, (n + 1) * size)
            scores = q[:, at] @ k[:, at].t() / math.sqrt(size)
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -math.inf).softmax(1) @ v[:, at])
        y = F.linear(torch.cat(heads, 1), block["attn.c_proj.weight"], block["attn.c_proj.bias"])
        x = x + y
        h = F.layer_norm(x, (config.n_embd,), block["ln_2.weight"], block["ln_2.bias"])
        h = F.gelu(
            F.linear(h, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]), approximate="tanh"
        )
        x = x + F.linear(h, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    h = F.layer_norm(
        x, (config.n_embd,), weights[prefix + "ln_f.weight"], weights[prefix + "ln_f.bias"]
    )
    return h @ weights["lm_head.weight"].t() if "lm_head.weight" in weights else h


def model_of(draw: Draw, name="gpt") -> str:
    """One of three tiny GPTs."""
    return f"{name}({draw.randrange(3)})"


def masks(draw: Draw, B, T) -> str:
    """No mask, or padding on one side."""
    left = draw.choice(["True", "False"])
    kind = draw.choice(["torch.bool", "torch.long", "torch.float32"])
    return draw.choice(["None", f"padding({draw.number()}, ({B}, {T}), {left}, {kind})"])


def wrong_masks(B, T):
    return [
        f"torch.full(({B}, {T}), 0.5)",
        f"torch.full(({B}, {T}), 2)",
        f"bits(1, ({B}, {T + 3}))",
        f"torch.full(({B}, {T}), -1)",
        "bits(1, (99,))",
        "'abc'",
        "[[1, 0]]",
        "True",
    ]


IDX = "idx|ids|token|prompt"
MASK = "mask|idx|shape"


@generator("GPT.forward", 3)
def forward(draw):
    B, T = draw.randint(1, 3), draw.randint(1, 12)
    model = model_of(draw)

    def right(result, idx, targets, attention_mask):
        logits, loss = result
        nll = []
        from tests.fuzz_names import gpt

        for (b, t), expected in double_logits(gpt(int(model[4])), idx, attention_mask).items():
            close(logits[b, t], expected, 1e-3)
            if targets is not None and targets[b, t] >= 0 and attention_mask is None:
                nll.append(-expected.log_softmax(0)[targets[b, t]])
        if nll:
            close(loss, torch.stack(nll).mean(), 1e-3)
        assert (loss is None) == (targets is None)

    arguments = {
        "idx": draw.ids(B, T),
        "targets": draw.choice(["None", draw.ids(B, T), f"{draw.ids(B, T)} - 1"]),
        "attention_mask": masks(draw, B, T),
    }
    wrong = {
        "idx": [*WRONG_IDS, LONG],
        "targets": [
            f"torch.full(({B}, {T}), {VOCAB})",
            f"torch.full(({B}, {T}), -100)",
            "[[1]]",
            "'abc'",
            f"floats(1, ({B}, {T}))",
            f"ids(1, ({B}, {T + 1}))",
            f"ids(1, ({T},))",
            "3",
            f"ids(1, ({B}, {T})).int()",
        ],
        "attention_mask": wrong_masks(B, T),
    }
    alias = {"idx": IDX, "attention_mask": MASK, "targets": "targets"}
    return Plan(model, arguments, right, wrong, alias=alias)


@generator("GPT.log_probs", 2)
def log_probs(draw):
    B, T = draw.randint(1, 3), draw.randint(2, 13)
    model = model_of(draw)

    def right(result, idx, attention_mask, temperature):
        from tests.fuzz_names import gpt

        assert result.shape == (B, T - 1)
        head = None if attention_mask is None else attention_mask[:, :-1]
        for (b, t), logits in double_logits(gpt(int(model[4])), idx[:, :-1], head).items():
            if attention_mask is None or attention_mask[b, t + 1]:
                close(result[b, t], (logits / temperature).log_softmax(0)[idx[b, t + 1]], 1e-3)

    arguments = {
        "idx": draw.ids(B, T),
        "attention_mask": masks(draw, B, T),
        "temperature": draw.choice(["1.0", "0.5", "2", "np.float64(1.5)"]),
    }
    wrong = {
        "idx": [*WRONG_IDS, LONG, f"ids(1, ({B}, 1))"],
        "attention_mask": wrong_masks(B, T),
        "temperature": ["0", "-1", "None", "'1'", "math.nan", "math.inf", "1e-9", "True"],
    }
    alias = {"idx": IDX, "attention_mask": MASK}
    return Plan(f"{model}.log_probs", arguments, right, wrong, alias=alias)


def check_generated(model, tokens, log_probs, idx, options):
    """What holds for everything that generate returns."""
    B, T = idx.shape
    n = tokens.size(1) - T
    assert 1 <= n <= options["max_new_tokens"] and torch.equal(tokens[:, :T], idx)
    stops = options["stop_token"]
    stops = [] if stops is None else list(stops) if isinstance(stops, (list, tuple)) else [stops]
    greedy = options["temperature"] == 0 or not options["do_sample"]
    mask = options["attention_mask"]
    all_ended = True
    for b in range(B):
        real = torch.ones(T, dtype=torch.bool) if mask is None else mask[b].bool()
        prompt, ended = idx[b][real].tolist(), False
        for i in range(n):
            token = tokens[b, T + i].item()
            if ended:
                assert token == prompt[-1], "a row that has ended repeats its stop token"
                continue
            logits = model_logits(model, prompt)
            check_choice(
                logits, token, None if log_probs is None else log_probs[b, i], greedy, options
            )
            prompt.append(token)
            ended = token in stops
        all_ended = all_ended and ended
    assert n == options["max_new_tokens"] or all_ended


def model_logits(model, prompt):
    """The next token's logits in float64."""
    window = torch.tensor([prompt[-model.config.block_size :]])
    return double_logits(model, window)[0, window.size(1) - 1]


def check_choice(logits, token, log_prob, greedy, options):
    """One token, against the logits that it was chosen from."""
    if greedy:
        assert logits[token] > logits.max() - 1e-3, "not the likeliest token"
    temperature = options["temperature"] or 1.0
    probs = (logits / temperature).softmax(0)
    top_k, top_p = options["top_k"], options["top_p"]
    if top_k is not None:
        kth = probs.sort(descending=True).values[top_k - 1]
        assert greedy or probs[token] >= kth - 1e-5, "outside of top_k"
    if top_p is not None and not greedy and top_k is None:
        more_likely = probs[probs > probs[token] + 1e-5].sum()
        assert more_likely < top_p + 1e-4, "outside of top_p"
    if log_prob is not None and top_k is None and top_p is None:
        close(log_prob, probs[token].log(), 1e-3)


def generation_plan(draw, method):
    B, T = draw.randint(1, 3), draw.randint(1, 8)
    model = model_of(draw)
    n = draw.randint(1, 5)
    mask = masks(draw, B, T)
    if mask == "None" and draw.likely(0.2):
        n += 9  # slides past block_size

    def right(result, idx, **options):
        from tests.fuzz_names import gpt

        log_probs = None
        if method == "stream":
            columns = [c[0] if options["return_log_probs"] else c for c in result]
            if options["return_log_probs"]:
                log_probs = torch.cat([c[1] for c in result], 1)
            tokens = torch.cat([idx, *columns], 1)
        else:
            tokens = result
            if options["return_log_probs"]:
                tokens, log_probs = result
        check_generated(gpt(int(model[4])), tokens, log_probs, idx, options)

    arguments = {
        "idx": draw.ids(B, T),
        "max_new_tokens": str(n),
        "temperature": draw.choice(["1.0", "0", "0.7", "2", "np.float32(0.5)"]),
        "do_sample": draw.choice(["True", "False"]),
        "top_k": draw.choice(["None", "None", "1", "3", "np.int64(11)"]),
        "top_p": draw.choice(["None", "None", "1.0", "0.5", "1"]),
        "attention_mask": mask,
        "stop_token": draw.choice(["None", "3", "[3, 5]", "(0,)", "np.int64(4)"]),
        "generator": draw.choice(["None", f"rng({draw.number()})"]),
        "return_log_probs": draw.choice(["True", "False"]),
    }
    wrong = {
        "idx": [*WRONG_IDS, "torch.zeros(1, 0).long()", "ids(1, (1, 3), 11).int()"],
        "max_new_tokens": ["0", "-1", "1.5", "'3'", "None", "True", "math.nan", "[3]"],
        "temperature": ["-1", "None", "'1'", "math.nan", "1e-9", "math.inf", "True", "[1.0]"],
        "do_sample": ["'False'", "None", "2", "1.0", "[]"],
        "top_k": ["0", "-1", "12", "1.5", "'3'", "True", "math.nan", "[3]"],
        "top_p": ["0", "-0.1", "1.1", "'0.9'", "math.nan", "True", "[0.5]"],
        "attention_mask": [*wrong_masks(B, T), f"torch.zeros({B}, {T}).bool()", "7"],
        "stop_token": ["-1", "11", "'x'", "[]", "[3, 11]", "1.5", "[1.5]", "True", "{}", "['a']"],
        "generator": ["3", "'seed'", "np.random.RandomState(0)"],
        "return_log_probs": ["'False'", "None", "1.0", "[]"],
    }
    alias = {"idx": IDX, "attention_mask": MASK}
    return Plan(f"{model}.{method}", arguments, right, wrong, alias=alias)


@generator("GPT.generate", 4)
def generate(draw):
    return generation_plan(draw, "generate")


@generator("GPT.stream", 1)
def stream(draw):
    return generation_plan(draw, "stream")


# --------------------------------------------------------------------------------------------------
# Options of a model


WRONG_OPTIONS = {
    "n_layer": ["0", "-1", "1.5", "'2'", "None", "True", "[1]"],
    "n_head": ["0", "3", "2.0", "'2'", "None"],
    "n_embd": ["0", "7.5", "16.0", "'16'", "None", "math.nan"],
    "vocab_size": ["0", "-5", "None", "'11'", "11.0", "True"],
    "block_size": ["0", "None", "'12'", "12.5", "math.inf"],
    "embd_pdrop": ["-0.1", "1.0", "2", "'0.1'", "None", "math.nan", "True"],
    "resid_pdrop": ["1", "'x'", "None", "[0.1]"],
    "attn_pdrop": ["-1", "1.5", "None", "{}"],
    "tie_weights": ["'False'", "None", "0", "1", "'yes'", "[]"],
    "model_type": ["'gpt2'", "'gpt5'", "3", "['gpt-nano']"],
    "dropout": ["0.0"],
    "n_layers": ["2"],
}


def model_options(draw):
    """{option: source} of a tiny model."""
    return {
        "n_layer": draw.choice(["1", "2", "np.int64(2)"]),
        "n_head": draw.choice(["1", "2", "4"]),
        "n_embd": draw.choice(["8", "16"]),
        "vocab_size": draw.choice(["5", "11", "np.int32(7)"]),
        "block_size": draw.choice(["4", "12"]),
        "embd_pdrop": draw.choice(["0.0", "0.1", "np.float32(0.5)"]),
        "tie_weights": draw.choice(["True", "False", "np.bool_(True)"]),
    }


def construction_plan(draw, cls):
    arguments = model_options(draw)

    def right(result, **options):
        assert result.config.n_layer == options["n_layer"]
        assert result.transformer.wte.weight.shape == (options["vocab_size"], options["n_embd"])
        C, V, T, L = (int(options[k]) for k in ("n_embd", "vocab_size", "block_size", "n_layer"))
        block = 12 * C * C + 13 * C
        expected = V * C + T * C + L * block + 2 * C
        if cls == "GPT":
            expected += 0 if options["tie_weights"] else V * C
        else:
            expected += C + 1
        assert sum(p.numel() for p in result.parameters()) == expected

    function = f"(lambda **o: {cls}(options({cls}.get_default_config, **o)))"
    return Plan(
        function,
        arguments,
        right,
        WRONG_OPTIONS,
        alias={
            "n_embd": "n_embd",
            "n_head": "n_head",
            "model_type": "model_type",
            "dropout": "dropout",
        },
    )


@generator("GPT", 2)
def make_gpt(draw):
    return construction_plan(draw, "GPT")


@generator("RewardModel", 0.7)
def make_reward_model(draw):
    return construction_plan(draw, "RewardModel")


@generator("ValueModel", 0.7)
def make_value_model(draw):
    return construction_plan(draw, "ValueModel")


@generator("model(config)")
def make_from_nothing(draw):
    """A config that is none, or lacks an option."""
    cls = draw.choice(["GPT", "RewardModel", "ValueModel"])
    name = draw.choice(["n_layer", "vocab_size", "tie_weights", "attn_pdrop", "model_type"])
    sizes = "n_layer=1, n_head=1, n_embd=8, vocab_size=5, block_size=4"
    good = f"options({cls}.get_default_config, {sizes})"
    wrong = [
        "None",
        "{}",
        "'gpt2'",
        "3",
        f"without({good}, '{name}')",
        "CfgNode()",
        "Trainer.get_default_config()",
        "dict(n_layer=1)",
        f"{cls}.get_default_config()",
    ]
    alias = {"_config": "config|options|dict|" + name}
    return Plan(
        cls, {"_config": good}, lambda result, config: None, {"_config": wrong}, alias=alias
    )


# --------------------------------------------------------------------------------------------------
# Heads


@generator("RewardModel.forward", 1.5)
def score_texts(draw):
    B, T = draw.randint(1, 3), draw.randint(1, 12)

    def right(result, idx, attention_mask):
        from tests.fuzz_names import reward_model

        model = reward_model(1)
        for b in range(B):
            real = torch.ones(T).bool() if attention_mask is None else attention_mask[b].bool()
            hidden = hidden_of(model, idx[b][real])[-1]
            close(result[b], hidden @ model.head.weight[0].double() + model.head.bias.item(), 1e-3)

    arguments = {"idx": draw.ids(B, T), "attention_mask": masks(draw, B, T)}
    wrong = {"idx": [*WRONG_IDS, LONG], "attention_mask": wrong_masks(B, T)}
    alias = {"idx": IDX, "attention_mask": MASK}
    return Plan("reward_model(1)", arguments, right, wrong, alias=alias)


def hidden_of(model, ids):
    """The trunk's hidden states of one row in float64."""
    weights = {name: p.double() for name, p in model.state_dict().items()}
    return one_row(model.config, weights, ids)


@generator("ValueModel.forward", 1.5)
def values_of_texts(draw):
    B, T = draw.randint(1, 3), draw.randint(1, 12)

    def right(result, idx, attention_mask):
        from tests.fuzz_names import value_model

        model = value_model(1)
        assert result.shape == (B, T)
        for b in range(B):
            real = torch.ones(T).bool() if attention_mask is None else attention_mask[b].bool()
            hidden = hidden_of(model, idx[b][real])
            expected = hidden @ model.head.weight[0].double() + model.head.bias.item()
            close(result[b][real], expected, 1e-3)

    arguments = {"idx": draw.ids(B, T), "attention_mask": masks(draw, B, T)}
    wrong = {"idx": [*WRONG_IDS, LONG], "attention_mask": wrong_masks(B, T)}
    alias = {"idx": IDX, "attention_mask": MASK}
    return Plan("value_model(1)", arguments, right, wrong, alias=alias)


@generator("from_gpt")
def from_gpt(draw):
    cls = draw.choice(["RewardModel", "ValueModel"])
    source = draw.choice(["gpt(1)", "reward_model(1)", "value_model(1)"])

    def right(result, model):
        for name, p in model.transformer.state_dict().items():
            assert torch.equal(result.transformer.state_dict()[name], p)

    wrong = {"_model": ["None", "'gpt2'", "nn.Linear(2, 2)", "{}", "gpt(1).transformer"]}
    return Plan(f"{cls}.from_gpt", {"_model": source}, right, wrong, alias={"_model": "GPT|model"})


@generator("RewardModel.normalize")
def normalize(draw):
    n = draw.randint(2, 6)

    def right(result, scores, unit_variance):
        assert result is None

    arguments = {"scores": draw.floats(n), "unit_variance": draw.choice(["True", "False"])}
    wrong = {
        "scores": [
            "[1.0, 2.0]",
            "None",
            "torch.tensor([1.0, math.nan])",
            "torch.zeros(0)",
            "torch.tensor([math.inf, 1.0])",
            "3.5",
            "torch.ones(2, 2)",
        ],
        "unit_variance": ["'False'", "None", "2"],
    }
    if arguments["unit_variance"] == "True":
        wrong["scores"].append("torch.ones(3)")
    return Plan("RewardModel.from_gpt(gpt(0)).normalize", arguments, right, wrong)


@generator("ActorCritic")
def actor_critic(draw):
    B, T = draw.randint(1, 3), draw.randint(2, 12)
    value = draw.choice(["None", "value_model(1)", "ValueHead(16)"])

    def right(result, idx, attention_mask):
        from tests.fuzz_names import gpt

        log_probs, values = result
        assert log_probs.shape == values.shape == (B, T - 1)
        expected = gpt(2).log_probs(idx, attention_mask)
        both = attention_mask.bool()[:, 1:] & attention_mask.bool()[:, :-1]
        close(log_probs[both], expected[both], 1e-3)

    left = draw.choice(["True", "False"])
    arguments = {
        "idx": draw.ids(B, T),
        "attention_mask": f"padding({draw.number()}, ({B}, {T}), {left})",
    }
    wrong = {"idx": WRONG_IDS, "attention_mask": [*wrong_masks(B, T), "None"]}
    alias = {"idx": IDX, "attention_mask": MASK}
    return Plan(f"ActorCritic(gpt(2), {value})", arguments, right, wrong, alias=alias)


@generator("comparison_loss")
def comparison_loss(draw):
    B, K, P, T = (draw.randint(1, 3), draw.randint(2, 3), draw.randint(1, 3), draw.randint(1, 4))
    prompt = f"{draw.ids(B, 1, P)}.expand({B}, {K}, {P})"
    idx = f"torch.cat([{prompt}, {draw.ids(B, K, T)}], 2)"
    ones = f"torch.ones({B}, {K}, {P + T}).bool()"
    written = f"torch.arange({P + T}).ge({P}).expand({B}, {K}, {P + T})"

    def right(result, model, batch, centering):
        loss, metrics = result
        scores = model(batch[0].flatten(0, 1)).view(B, K).double()
        margins = scores[:, :1] - scores[:, 1:]
        expected = -F.logsigmoid(margins).mean()
        expected = expected + centering * ((scores[:, :1] + scores[:, 1:]) ** 2).mean()
        close(loss, expected, 1e-3)
        # Two equal texts may differ in the last digit.
        low, high = ((margins > end).double().mean().item() for end in (1e-5, -1e-5))
        assert low - 1e-5 <= metrics["accuracy"].item() <= high + 1e-5

    arguments = {
        "model": "reward_model(1)",
        "batch": f"({idx}, {ones}, {written})",
        "centering": draw.choice(["0.0", "0.01", "1"]),
    }
    wrong = {
        "batch": [
            f"({idx}, {ones})",
            "None",
            f"[{idx}[:, 0], {ones}, {written}]",
            f"{idx}",
            f"({idx}, {ones}, None)",
            f"({idx}.float(), {ones}, {written})",
            f"({idx}[:, :1], {ones}[:, :1], {written}[:, :1])",
        ],
        "centering": ["-0.1", "None", "'0'", "math.nan"],
    }
    alias = {"batch": "batch|idx|shape|tensor|completion"}
    return Plan("comparison_loss", arguments, right, wrong, alias=alias)


@generator("DPOLoss")
def make_dpo(draw):
    loss = draw.choice(["dpo", "ipo", "simpo"])

    def right(result, **options):
        assert result.loss == loss

    arguments = {
        "ref_policy": "None" if loss == "simpo" else "gpt(1)",
        "loss": repr(loss),
        "beta": draw.choice(["None", "0.1", "1"]),
        "gamma": draw.choice(["None", "0.5"]) if loss == "simpo" else "None",
        "dropout": draw.choice(["True", "False"]),
    }
    wrong = {
        "ref_policy": ["gpt(1)"] if loss == "simpo" else ["None", "'gpt2'", "3"],
        "loss": ["'DPO'", "None", "3", "['dpo']"],
        "beta": ["0", "-1", "'1'", "math.nan", "True"],
        "gamma": ["'1'", "-1", "math.inf"] if loss == "simpo" else ["1.0", "'1'"],
        "dropout": ["'False'", "None", "2"],
    }
    alias = {"ref_policy": "reference|ref_policy"}
    return Plan("DPOLoss", arguments, right, wrong, alias=alias)


@generator("DPOLoss.call")
def call_dpo(draw):
    B, K, P, T = (draw.randint(1, 3), draw.randint(2, 3), draw.randint(1, 3), draw.randint(1, 4))
    prompt = f"{draw.ids(B, 1, P)}.expand({B}, {K}, {P})"
    idx = f"torch.cat([{prompt}, {draw.ids(B, K, T)}], 2)"
    ones = f"torch.ones({B}, {K}, {P + T}).bool()"
    written = f"torch.arange({P + T}).ge({P}).expand({B}, {K}, {P + T})"

    def right(result, model, batch):
        sums = []
        from tests.fuzz_names import gpt

        for policy in (gpt(2), gpt(1)):
            log_p = policy.log_probs(batch[0].flatten(0, 1))
            sums.append(log_p[:, P - 1 :].sum(1).view(B, K).double())
        h = 0.5 * (sums[0] - sums[1])
        close(result[0], -F.logsigmoid(h[:, :1] - h[:, 1:]).mean(), 1e-3)

    arguments = {"model": "ActorCritic(gpt(2))", "batch": f"({idx}, {ones}, {written})"}
    wrong = {
        "model": ["None", "gpt(2)", "reward_model(1)"],
        "batch": [
            f"({idx}, {ones})",
            "None",
            f"[{idx}[:, 0], {ones}, {written}]",
            f"({idx}.float(), {ones}, {written})",
            f"({idx}[:, :1], {ones}[:, :1], {written}[:, :1])",
        ],
    }
    alias = {"batch": "batch|idx|shape|tensor|completion", "model": "model|ActorCritic"}
    return Plan("DPOLoss(gpt(1), beta=0.5)", arguments, right, wrong, alias=alias)


# --------------------------------------------------------------------------------------------------
# Weights in files


BROKEN_FILES = [
    "b''",
    "b'abc'",
    "b'PK\\x03\\x04'",
    "b'\\x80\\x02K\\x01.'",
    "bytes(1000)",
    "b'{\"a\": 1}'",
    "bytes(range(256)) * 40",
    "'not weights'.encode('utf-16')",
]
# Statements that make something at the path `broken`, which is no model.
BROKEN_MODELS = [
    "write('m/model.safetensors', good[:{cut}])",
    "write('m/model.safetensors', good[:-1])",
    "write('m/model.safetensors', bytes([255] * 8) + good[8:])",
    "write('m/pytorch_model.bin', b'junk')",
    "torch.save([1, 2], BIN)",
    "torch.save({{'a': torch.ones(2)}}, BIN)",
    "torch.save({{'model': 3}}, BIN)",
    "torch.save({{'model_args': 3, 'model': gpt(0).state_dict()}}, BIN)",
    "torch.save({{'x': torch.zeros(1).expand(10**6)}}, BIN)",
    "write('m/model.safetensors.index.json', '{{}}')",
    'write(\'m/model.safetensors.index.json\', \'{{"weight_map": {{"a": "../x"}}}}\')',
    "write('m/model.safetensors.index.json', '[1]')",
    "None",
]
BROKEN_CONFIGS = [
    "''",
    "'[]'",
    "'null'",
    "'{{'",
    '\'{{"model_type": "bert"}}\'',
    "'\\xff'.encode('latin-1')",
    '\'{{"model_type": "gpt2", "n_head": "2"}}\'',
    '\'{{"model_type": "gpt2", "n_head": 3}}\'',
    '\'{{"model_type": "gpt2", "n_head": 0}}\'',
    '\'{{"model_type": "gpt2", "n_layer": 7}}\'',
    '\'{{"model_type": "gpt2", "n_head": [2]}}\'',
    '\'{{"model_type": [], "n_head": 2}}\'',
    '\'{{"model_type": "gpt2", "n_head": 2, "embd_pdrop": "x"}}\'',
    '\'{{"model_type": "gpt2", "n_head": 2, "tie_word_embeddings": "x"}}\'',
    '\'{{"model_type": "gpt2", "n_head": 2, "layer_norm_epsilon": 1e-6}}\'',
    '\'{{"model_type": "gpt2", "activation_function": "relu", "n_head": 2}}\'',
    '\'{{"model_type": "gpt2", "n_head": 2, "activation_function": []}}\'',
    "'[' * 100000",
    '\'{{"model_type": "gpt2", "n_head": 2, "vocab_size": 12}}\'',
    '\'{{"model_type": "gpt2", "n_head": 1e9}}\'',
    '\'{{"model_type": "gpt2", "n_head": 2, "n_positions": null}}\' * 2',
    '\'{{"model": {{"model_type": "gpt-nano", "n_head": 7}}}}\'',
]


@generator("from_pretrained", 4)
def from_pretrained(draw):
    cls, make = draw.choice(
        [("GPT", "gpt"), ("RewardModel", "reward_model"), ("ValueModel", "value_model")]
    )
    model = f"{make}(1)"

    def right(result, name_or_path):
        from tests import fuzz_names

        original = getattr(fuzz_names, make)(1)
        assert not result.training
        for name, p in original.state_dict().items():
            assert torch.equal(result.state_dict()[name], p), name
        assert result.config.n_head == 2

    setup = [
        "BIN = FOLDER / 'm' / 'pytorch_model.bin'",
        f"{model}.save_pretrained(FOLDER / 'good')",
        "good = (FOLDER / 'good' / 'model.safetensors').read_bytes()",
        "shutil.copytree(FOLDER / 'good', FOLDER / 'm')",
    ]
    if draw.likely(0.5):
        broken = draw.choice(BROKEN_MODELS).format(cut=draw.randint(0, 4000))
        setup += ["(FOLDER / 'm' / 'model.safetensors').unlink()", broken]
    elif draw.likely(0.8):
        setup.append(f"write('m/config.json', {draw.choice(BROKEN_CONFIGS).format()})")
    elif draw.likely(0.5):
        setup += [f"write('m/model.safetensors', {draw.choice(BROKEN_FILES)})"]
    else:
        adapters = [
            "{}",
            "{'base_model_name_or_path': str(FOLDER / 'm')}",
            "[1]",
            "{'base_model_name_or_path': str(FOLDER / 'no')}",
            "{'base_model_name_or_path': 3}",
        ]
        setup += [f"write('m/adapter_config.json', json.dumps({draw.choice(adapters)}))"]
    wrong = [
        "FOLDER / 'm'",
        "str(FOLDER / 'm')",
        "FOLDER / 'm'",
        "FOLDER / 'm'",
        "FOLDER / 'm'",
        "FOLDER / 'missing' / 'file.pt'",
        "'../../etc'",
        "''",
        "None",
        "3",
        "['gpt2']",
        "b'gpt2'",
        "'a/b/c'",
        "'\\0'",
        "'x' * 5000",
        "FOLDER / 'm' / 'config.json'",
        f"write('m.gguf', {draw.choice(BROKEN_FILES)})",
        "write('m.gguf', b'GGUF' + bytes(20))",
        "write('m.gguf', b'GGUF\\x03\\0\\0\\0' + bytes([255] * 40))",
    ]
    other = "ValueModel" if cls == "GPT" else "GPT"
    wrong.append(
        f"({other}.from_gpt(gpt(0)) if {other} is not GPT else gpt(0))"
        ".save_pretrained(FOLDER / 'other') or FOLDER / 'other'"
    )
    good = draw.choice(
        ["FOLDER / 'good'", "str(FOLDER / 'good')", "FOLDER / 'good' / 'model.safetensors'"]
    )
    alias = {"_name_or_path": "fuzz-|path|name|got|model"}
    return Plan(
        f"{cls}.from_pretrained",
        {"_name_or_path": good},
        right,
        {"_name_or_path": wrong},
        setup,
        alias,
    )


@generator("from_pretrained deflated", 0.5)
def from_deflated(draw):
    """A file of torch.save's that was zipped again: read, not mapped. Cut records are refused."""
    setup = [
        "torch.save(gpt(1).state_dict(), FOLDER / 'a.pt')",
        "zip_again(FOLDER / 'a.pt', FOLDER / 'b.pt')",
        f"zip_again(FOLDER / 'a.pt', FOLDER / 'c.pt', cut={draw.randint(1, 40)})",
    ]

    def right(result, name_or_path, n_head):
        from tests.fuzz_names import gpt, ids

        assert torch.equal(result(ids(1, (2, 5)))[0], gpt(1)(ids(1, (2, 5)))[0])

    good = draw.choice(["FOLDER / 'a.pt'", "FOLDER / 'b.pt'"])
    arguments = {"_name_or_path": good, "n_head": "2"}
    wrong = {"_name_or_path": ["FOLDER / 'c.pt'"], "n_head": ["None", "3"]}
    alias = {"_name_or_path": "fuzz-", "n_head": "n_head|heads"}
    return Plan("GPT.from_pretrained", arguments, right, wrong, setup, alias)


@generator("next_logits")
def next_logits(draw):
    B = draw.randint(1, 12)

    def right(result, x, weight):
        close(result, x.double() @ weight.double().t())

    arguments = {"x": draw.floats(B, 5), "weight": draw.floats(7, 5)}
    return Plan(
        draw.choice(["next_logits", "Unembed.apply"]).replace(
            "Unembed.apply", "(lambda x, weight: Unembed.apply(x[None], weight)[0])"
        ),
        arguments,
        right,
    )


@generator("from_pretrained options")
def from_pretrained_options(draw):
    right_options = {
        "n_head": "2",
        "embd_pdrop": draw.choice(["0.0", "0.3"]),
        "revision": "'main'",
    }

    def right(result, name_or_path, n_head, embd_pdrop, revision):
        assert result.config.embd_pdrop == embd_pdrop

    wrong = {
        "n_head": ["3", "'2'", "0", "None", "2.0", "True"],
        "embd_pdrop": ["'x'", "-1", "None", "2"],
        "dropout": ["0.1"],
        "n_layer": ["7", "'2'"],
        "vocab_size": ["12"],
        "activation_function": ["'relu'", "3", "[]"],
        "tie_weights": ["'False'", "3"],
    }
    arguments = {"_name_or_path": "FOLDER / 'good'", **right_options}
    alias = {name: name for name in wrong}
    alias |= {"n_layer": "n_layer", "vocab_size": "vocab_size"}
    return Plan(
        "GPT.from_pretrained",
        arguments,
        right,
        wrong,
        ["gpt(1).save_pretrained(FOLDER / 'good')"],
        alias,
    )


@generator("from_pretrained state dict")
def from_state_dict(draw):
    """nanoGPT's, minGPT's, a trainer's checkpoint: which must say how many heads there are."""
    prefix = draw.choice(["", "_orig_mod.", "module.", "policy."])
    state = f"{{'{prefix}' + k: v for k, v in gpt(1).state_dict().items()}}"
    args = draw.choice(
        [
            "gpt(1).config.to_dict()",
            "{'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 12, 'vocab_size': 11}",
            "None",
        ]
    )
    setup = [f"torch.save({{'model': {state}, 'model_args': {args}}}, FOLDER / 'ckpt.pt')"]
    options = {"n_head": "2"}
    if "n_layer" in args:
        options["activation_function"] = "'gelu_new'"

    def right(result, name_or_path, **options):
        from tests.fuzz_names import gpt, ids

        idx = ids(1, (2, 5))
        close(result(idx)[0], gpt(1)(idx)[0], 1e-4)

    wrong = {"n_head": ["None", "3", "'2'"], "n_embd": ["32"], "n_layer": ["1"]}
    if "activation_function" in options:
        wrong["activation_function"] = ["'gelu'", "'relu'"]
    arguments = {"_name_or_path": "FOLDER / 'ckpt.pt'", **options}
    alias = {"n_embd": "n_embd", "n_layer": "n_layer", "n_head": "n_head|heads"}
    return Plan("GPT.from_pretrained", arguments, right, wrong, setup, alias)


@generator("save_pretrained")
def save_pretrained(draw):
    make = draw.choice(["gpt", "reward_model", "value_model"])

    def right(result, folder):
        from tests.fuzz_names import FOLDER

        assert sorted(p.name for p in (FOLDER / "out").iterdir()) == [
            "config.json",
            "model.safetensors",
        ]

    arguments = {"_folder": draw.choice(["FOLDER / 'out'", "str(FOLDER / 'out')"])}
    wrong = {"_folder": ["None", "3", "FOLDER / 'file'", "['a']", "b'x'"]}
    return Plan(
        f"{make}(1).save_pretrained",
        arguments,
        right,
        wrong,
        ["write('file', 'x')"],
        {"_folder": "file|folder|path"},
        ("OSError",),
    )
