"""Training: constructions, an iteration or two, resumed runs, rewards, samples, stages."""

import torch
from torch.nn import functional as F

from tests.fuzz import Draw, Plan, generator
from tests.fuzz_calls.numbers import close

RUN = {
    "device": ["'cpu'", "torch.device('cpu')"],
    "batch_size": ["4", "np.int64(6)", "12"],
    "max_iters": ["1", "2"],
    "learning_rate": ["1e-3", "np.float64(0.01)", "0"],
    "lr_schedule": ["'constant'", "'linear'", "'cosine'"],
    "warmup_iters": ["0", "1", "3"],
    "weight_decay": ["0.1", "0.0"],
    "grad_norm_clip": ["1.0", "None", "0"],
    "micro_batch_size": ["None", "1", "2", "5"],
    "log_every": ["1", "2"],
    "eval_every": ["None", "1"],
    "betas": ["(0.9, 0.95)", "[0.8, 0.9]"],
}
WRONG_RUN = {
    "device": ["'cuda'", "'tpu'", "None", "3", "'cuda:9'", "'mps'"],
    "batch_size": ["0", "-1", "2.5", "'4'", "None", "True", "10**9", "math.nan"],
    "max_iters": ["0", "-1", "1.5", "'2'", "True", "math.inf"],
    "epochs": ["-1", "'1'", "math.nan", "[1]"],
    "learning_rate": ["-1", "'x'", "None", "math.nan", "math.inf", "True"],
    "lr_schedule": ["'exp'", "None", "1", "['linear']"],
    "lr_final_fraction": ["-0.1", "None", "'x'"],
    "warmup_iters": ["-1", "None", "'x'", "math.nan"],
    "weight_decay": ["-0.1", "None", "math.inf"],
    "eps": ["-1", "None", "'x'"],
    "grad_norm_clip": ["-1", "'x'", "math.nan"],
    "micro_batch_size": ["0", "-1", "1.5", "'2'"],
    "log_every": ["0", "-1", "'x'", "1.5"],
    "eval_every": ["0", "'x'"],
    "checkpoint_every": ["0", "1.5"],
    "betas": ["(0.9,)", "None", "(0.9, 1.0)", "'ab'", "(0.1, 0.2, 0.3)", "(0.9, 'x')"],
    "precision": ["'fp8'", "None", "16"],
    "compile": ["'False'", "None", "1"],
    "num_workers": ["-1", "1.5", "None", "'2'"],
    "tensorboard": ["'no'", "1", "None", "True"],
    "work_dir": ["3", "['x']", "True"],
    "batch_sise": ["4"],
    "dropout": ["0.1"],
}


def run_options(draw: Draw, table=RUN) -> dict[str, str]:
    """Some options of a run; always a device, an end, and a batch size."""
    always = ("device", "batch_size", "max_iters", "max_new_tokens")
    return {
        name: draw.choice(values)
        for name, values in table.items()
        if name in always or draw.likely(0.4)
    }


@generator("Trainer.check_config", 3)
def trainer_options(draw):
    function = "(lambda **o: Trainer.check_config(options(Trainer.get_default_config, **o)))"
    wrong = {
        name: values
        for name, values in WRONG_RUN.items()
        if name not in ("device", "precision", "work_dir")
    }
    wrong["tensorboard"] = ["'no'", "1", "None"]
    wrong["batch_size"] = ["0", "-1", "2.5", "'4'", "None", "True", "math.nan"]
    return Plan(function, run_options(draw), lambda result, **rest: None, wrong)


@generator("Trainer", 2)
def trainer(draw):
    """An iteration or two of a GPT, against AdamW by hand where that is simple."""
    options = run_options(draw)

    def right(result, **options):
        assert result.iter_num == options["max_iters"]
        assert all(torch.isfinite(p).all() for p in result.model.parameters())
        if options["max_iters"] == 1:
            check_first_step(result, options)

    alias = {
        "batch_size": "batch_size|divided",
        "work_dir": "work_dir|path|expected",
        "tensorboard": "tensorboard",
        "precision": "precision",
    }
    return Plan("train_with", options, right, WRONG_RUN, alias=alias)


def check_first_step(trainer, options):
    """The loss of the first batch, by the functional form, on the examples that come first."""
    from tests.fuzz_names import fold, gpt

    order = torch.randperm(24, generator=torch.Generator().manual_seed(trainer.seed))
    batch = [fold(1)[i] for i in order[: options["batch_size"]].tolist()]
    x, y = (torch.stack(column) for column in zip(*batch, strict=True))
    logits, _ = gpt(1)(x)
    close(trainer.loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()), 1e-3)


@generator("Trainer(config)")
def trainer_without(draw):
    """No config, another's config, or one that lacks an option."""
    name = draw.choice(
        [
            "device",
            "batch_size",
            "betas",
            "work_dir",
            "precision",
            "tensorboard",
            "lr_schedule",
            "max_iters",
            "compile",
            "num_workers",
            "eps",
            "epochs",
        ]
    )
    good = "trainer_config()"
    wrong = [
        "None",
        "{}",
        "'x'",
        "CfgNode()",
        f"without({good}, {name!r})",
        f"without({good}, {name!r})",
        "PPOTrainer.get_default_config()",
        "GPT.get_default_config()",
        f"{good}.to_dict()",
    ]
    return Plan(
        "(lambda config: Trainer(config, new_gpt(1), fold(1)))",
        {"_config": good},
        lambda result, config: None,
        {"_config": wrong},
        alias={"_config": "config|options|" + name},
    )


@generator("Trainer(data)", 1.5)
def trainer_data(draw):
    """Models, datasets and functions that are none."""

    def right(result, **rest):
        assert result.iter_num == 1

    arguments = {
        "config": "trainer_config()",
        "model": "new_gpt(1)",
        "train_dataset": "fold(1)",
        "valid_dataset": draw.choice(["None", "fold(2)"]),
    }
    bad_items = [
        "[(1, 2)] * 4",
        "['ab'] * 4",
        "[None] * 4",
        "[{'x': 1}] * 4",
        "[(torch.tensor([1, 2]), torch.tensor([1, 99]))] * 4",
        "[(torch.tensor([1, 99]), torch.tensor([1, 2]))] * 4",
        "[(torch.tensor([1.5, 2]), torch.tensor([1, 2]))] * 4",
        "[(torch.tensor([1, 2]), torch.tensor([1, 2, 3]))] * 4",
        "[(ids(1, (40,), 11), ids(1, (40,), 11))] * 4",
        "[(torch.tensor([1, 2]), torch.tensor([1, -100]))] * 4",
        "[(ids(1, (n,), 11), ids(1, (n,), 11)) for n in (2, 3, 4, 5)]",
    ]
    wrong = {
        "model": ["None", "'gpt2'", "3", "lambda x: x", "new_gpt"],
        "train_dataset": [
            "None",
            "3",
            "[]",
            "iter([1, 2])",
            "'text'",
            "{}",
            "fold(1, 1)",
            *bad_items,
        ],
        "valid_dataset": ["3", "[]", "iter([1])", "{}"],
        "loss_fn": [
            "3",
            "'loss'",
            "lambda model: 0",
            "lambda model, batch: 'x'",
            "lambda model, batch: None",
            "lambda model, batch: 0.5",
            "lambda model, batch: torch.ones(3)",
            "lambda model, batch: (model(*batch)[1], {'loss': 1.0})",
            "lambda model, batch: (model(*batch)[1], 3)",
            "lambda model, batch: (model(*batch)[1], {'a': 'x'})",
            "lambda model, batch: (model(*batch)[1], {3: 1.0})",
        ],
        "collate_fn": [
            "3",
            "'x'",
            "lambda items: 3",
            "lambda items: []",
            "lambda items: 'ab'",
            "lambda items: (torch.tensor(1), torch.tensor(2))",
            "lambda items: {'x': torch.ones(2)}",
        ],
        "weight_fn": [
            "3",
            "'x'",
            "lambda batch: 'x'",
            "lambda batch: -1",
            "lambda batch: math.nan",
            "lambda batch: None",
        ],
    }
    alias = {
        "train_dataset": "train_dataset|batch|ids|idx|targets|example|item|longer|equal",
        "valid_dataset": "valid_dataset|batch",
        "loss_fn": "loss_fn|loss|metric|positional argument",
        "collate_fn": "collate_fn|batch",
        "weight_fn": "weight_fn|weight",
        "model": "model",
    }
    return Plan("train", arguments, right, wrong, [], alias, ("FloatingPointError",))


@generator("add_callback")
def add_callback(draw):
    good = "trainer_config()"
    setup = [f"trainer = Trainer({good}, new_gpt(1), fold(1))"]
    events = ["on_train_begin", "on_batch_end", "on_evaluate", "on_log", "on_train_end"]
    arguments = {"onevent": repr(draw.choice(events)), "callback": "lambda trainer: None"}
    wrong = {
        "onevent": ["'on_step_end'", "None", "3", "['on_log']", "''"],
        "callback": ["None", "3", "'f'"],
    }
    method = draw.choice(["add_callback", "set_callback"])
    return Plan(f"trainer.{method}", arguments, lambda result, **rest: None, wrong, setup)


@generator("resume", 2)
def resume(draw):
    def right(result, options, model, data, prepare):
        assert result.iter_num == 3
        from tests.fuzz_names import fold, new_gpt, train, trainer_config, utils

        # The same as a run that was never interrupted.
        utils.set_seed(5)
        whole = train(trainer_config(max_iters=3), new_gpt(1), fold(1))
        for name, p in whole.model.state_dict().items():
            assert torch.equal(p, result.model.state_dict()[name]), name

    names = [
        "iter_num",
        "config",
        "rng",
        "model",
        "optimizer",
        "scaler",
        "seed",
        "seconds",
        "best_valid_loss",
    ]
    name = draw.choice(names)
    value = draw.choice(
        ["None", "'x'", "[]", "{}", "-1", "math.nan", "[None]", "{'a': 1}", "2**70"]
    )
    if name in ("iter_num", "seed", "seconds", "best_valid_loss") and value in ("-1", "math.nan"):
        value = "'x'"
    if name in ("seconds", "best_valid_loss", "seed") and value == "2**70":
        value = "None"
    broken = [
        f"lambda: rewrite({name}={value})",
        f"lambda: drop({name!r})",
        f"lambda: cut({draw.randint(0, 9999)})",
        "lambda: torch.save(gpt(1).state_dict(), CHECKPOINT)",
        "lambda: torch.save([1], CHECKPOINT)",
        "lambda: write('run/checkpoint.pt', b'junk')",
        "lambda: write('run/checkpoint.pt', b'')",
        "lambda: rewrite(rng=[{}])",
        "lambda: rewrite(rng=load_torch(CHECKPOINT)['rng'] * 2)",
        "lambda: rewrite(optimizer={'state': {}, 'param_groups': []})",
        "lambda: rewrite_optimizer(state=3)",
        "lambda: rewrite(model={})",
        "lambda: rewrite(model={**load_torch(CHECKPOINT)['model'], 'x': torch.ones(1)})",
    ]
    wrong = {
        "options": [
            "{'max_iters': 3, 'learning_rate': 0.5}",
            "{'max_iters': 3, 'betas': (0.1, 0.2)}",
            "{'max_iters': 3, 'lr_schedule': 'linear'}",
        ],
        "model": [
            "new_gpt(1, n_layer=1)",
            "new_gpt(1, n_embd=8)",
            "new_gpt(1, tie_weights=False)",
            "reward_model(1)",
            "nn.Linear(2, 2)",
            "new_gpt(1, vocab_size=12)",
        ],
        "data": ["fold(1, 20)", "fold(1, 2)"],
        "prepare": broken,
    }
    arguments = {
        "options": "{'max_iters': 3}",
        "model": "new_gpt(1)",
        "data": "fold(1)",
        "prepare": "lambda: None",
    }
    alias = dict.fromkeys(arguments, "fuzz-|checkpoint|holds a run|another")
    return Plan("resume", arguments, right, wrong, ["begin_run()"], alias)


# --------------------------------------------------------------------------------------------------
# PPO

PPO_RUN = {
    "device": ["'cpu'"],
    "batch_size": ["4", "8"],
    "max_iters": ["1"],
    "max_new_tokens": ["3", "np.int64(4)"],
    "algorithm": [
        "'ppo'",
        "'reinforce'",
        "'reinforce_pp'",
        "'rloo'",
        "'grpo'",
        "'dr_grpo'",
        "'dapo'",
        "'gspo'",
    ],
    "temperature": ["1.0", "0.7", "2"],
    "stop_token": ["None", "10", "[3, 10]"],
    "ppo_epochs": ["None", "1", "2"],
    "minibatch_size": ["None", "4"],
    "micro_batch_size": ["None", "4"],
    "missing_eos_penalty": ["0.0", "1"],
    "gamma": ["1.0", "0.9"],
    "gae_lambda": ["0.95", "0"],
    "log_samples": ["0", "2"],
    "value_coef": ["0.1", "0"],
    "kl_estimator": ["None", "'k2'", "'k3'"],
}
WRONG_PPO = {
    **{
        name: WRONG_RUN[name]
        for name in (
            "device",
            "batch_size",
            "max_iters",
            "learning_rate",
            "betas",
            "micro_batch_size",
            "precision",
            "dropout",
            "eps",
        )
    },
    "algorithm": ["'pppo'", "None", "3", "['ppo']"],
    "advantage": ["'x'", "3", "['gae']"],
    "whiten_advantages": ["'True'", "2", "[]"],
    "kl_penalty": ["'both'", "True", "3"],
    "kl_estimator": ["'k4'", "4"],
    "kl_coef": ["-1", "'x'", "math.nan", "True"],
    "loss_mean": ["'words'", "1"],
    "ratio": ["'x'", "0"],
    "clip_range": ["-1", "'x'", "(0.1,)", "(0.1, 'x')", "math.nan", "True"],
    "skip_equal_groups": ["'yes'", "3"],
    "ppo_epochs": ["0", "-1", "1.5", "'x'"],
    "group_size": ["0", "3", "1.5", "'2'"],
    "max_new_tokens": ["0", "None", "'4'", "1.5", "100"],
    "temperature": ["0", "-1", "None", "'x'", "math.nan"],
    "stop_token": ["'x'", "1.5", "[]", "-1", "11", "[3, 99]", "{}", "True"],
    "missing_eos_penalty": ["-1", "None", "'x'"],
    "log_samples": ["-1", "None", "'x'", "1.5"],
    "whiten_rewards": ["'x'", "None", "1"],
    "shaping": ["'x'", "None", "1"],
    "kl_target": ["0", "-1", "'x'", "math.nan"],
    "kl_horizon": ["0", "None", "'x'"],
    "gamma": ["-1", "2", "None", "'x'"],
    "gae_lambda": ["-1", "2", "None", "math.nan"],
    "minibatch_size": ["0", "99", "1.5", "'x'"],
    "approxkl_max": ["0", "-1", "'x'"],
    "value_clip_range": ["-1", "None", "'x'"],
    "value_coef": ["-1", "None"],
    "value_lr_ratio": ["-1", "None", "'x'"],
    "shared_trunk": ["'x'", "None", "1"],
}


@generator("PPOTrainer.check_config", 3)
def ppo_options(draw):
    function = "(lambda **o: PPOTrainer.check_config(options(PPOTrainer.get_default_config, **o)))"
    wrong = {
        name: values
        for name, values in WRONG_PPO.items()
        if name not in ("device", "precision", "stop_token")
    }
    wrong["batch_size"] = ["0", "-1", "2.5", "'4'", "None", "True", "math.nan"]
    wrong["max_new_tokens"] = ["0", "None", "'4'", "1.5"]
    return Plan(
        function,
        run_options(draw, PPO_RUN),
        lambda result, **rest: None,
        wrong,
        alias={"group_size": "group_size|batch_size"},
    )


@generator("PPOTrainer", 1)
def ppo(draw):
    def right(result, **options):
        assert result.iter_num == 1
        metrics = result.metrics
        assert metrics["log_prob_error"] < 1e-4, "the ratio does not start at 1"
        assert abs(metrics["objective/kl"]) < 1e-3, "the reference is the policy at first"
        rollout = result.last_rollout
        expected = ((rollout.idx[:, 1:] == 3) & rollout.mask).sum(1)
        penalty = options.get("missing_eos_penalty", 0.0) * (~rollout.ended).float()
        close(rollout.scores, expected - penalty)

    options = run_options(draw, PPO_RUN)
    if options.get("missing_eos_penalty"):
        options.pop("stop_token", None)
    return Plan(
        "train_ppo_with",
        options,
        right,
        WRONG_PPO,
        alias={
            "group_size": "group_size|batch_size",
            "max_new_tokens": "max_new_tokens|block_size",
        },
    )


@generator("PPOTrainer(arguments)", 1.5)
def ppo_arguments(draw):
    def right(result, **rest):
        assert result.iter_num == 1 and result.metrics["log_prob_error"] < 1e-4

    name = draw.choice(
        ["device", "algorithm", "max_new_tokens", "kl_target", "batch_size", "stop_token"]
    )
    arguments = {
        "config": "ppo_config()",
        "policy": "new_gpt(1)",
        "reward_fn": draw.choice(["threes", "reward_model(1)", "TextReward(plain, LETTERS)"]),
        "prompts": draw.choice(
            [
                "['ab', 'c', 'de']",
                "[[1, 2], [3]]",
                "ids(1, (3, 2), 11)",
                "[{'prompt': 'ab'}, {'prompt': 'c'}]",
            ]
        ),
        "value_model": draw.choice(["None", "ValueModel.from_gpt(gpt(1))"]),
        "ref_policy": draw.choice(["None", "new_gpt(2)"]),
        "tokenizer": "LETTERS",
    }
    wrong = {
        "config": [
            "None",
            "{}",
            "Trainer.get_default_config()",
            "GPT.get_default_config()",
            f"without(ppo_config(), {name!r})",
            "CfgNode()",
            "'x'",
        ],
        "policy": ["None", "'gpt2'", "reward_model(1)", "nn.Linear(2, 2)", "3", "GPT"],
        "reward_fn": [
            "None",
            "3",
            "plain",
            "'x'",
            "lambda idx, attention_mask, completion_mask: 1",
            "lambda idx, attention_mask, completion_mask: [1.0] * len(idx)",
            "lambda idx, attention_mask, completion_mask: torch.ones(len(idx), 1)",
            "lambda idx, attention_mask, completion_mask: torch.full((len(idx),), math.nan)",
            "lambda idx, attention_mask, completion_mask: idx[99]",
            "lambda a: torch.ones(len(a))",
            "gpt(1)",
        ],
        "prompts": [
            "None",
            "[]",
            "'abc'",
            "[3]",
            "['']",
            "['xyz']",
            "['a' * 50]",
            "[[1.5]]",
            "[[99]]",
            "[[-1]]",
            "[None]",
            "3",
            "[[]]",
            "[{'x': 1}]",
        ],
        "value_model": [
            "Column()",
            "gpt(1)",
            "3",
            "'x'",
            "nn.Linear(2, 2)",
            "ValueModel.from_gpt(gpt(1, vocab_size=7))",
        ],
        "ref_policy": [
            "3",
            "'x'",
            "nn.Linear(2, 2)",
            "new_gpt(2, vocab_size=7)",
            "reward_model(1)",
        ],
        "tokenizer": ["3", "'gpt2'"],
    }
    if "'" in arguments["prompts"]:
        wrong["tokenizer"].append("None")
    alias = {
        "config": "config|options|" + name,
        "policy": "policy",
        "reward_fn": "reward_fn|reward",
        "prompts": "prompt|row|character|ids|idx",
        "value_model": "value",
        "ref_policy": "ref_policy|reference",
        "tokenizer": "tokenizer",
    }
    return Plan("train_ppo", arguments, right, wrong, [], alias, ("RewardError",))


# --------------------------------------------------------------------------------------------------
# Rewards on text, and samples


@generator("TextReward", 1.5)
def text_reward(draw):
    f = draw.choice(["length", "[length]", "[length, maybe]", "(length, length)"])
    count = 2 if "," in f else 1

    def right(result, f, tokenizer, weights):
        idx = torch.tensor([[1, 2, 3, 10], [4, 5, 10, 10]])
        real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
        written = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]]).bool()
        scores = result(idx, real, written)
        factors = [1.0] * count if weights is None else [float(w) for w in weights]
        completions = ["d", ""]
        expected = []
        for c in completions:
            given = [len(c)]
            if "maybe" in str([g.__name__ for g in (f if isinstance(f, (list, tuple)) else [f])]):
                given.append(2 if c else 0)
            elif count == 2:
                given.append(len(c))
            expected.append(sum(w * g for w, g in zip(factors, given, strict=True)))
        close(scores, expected)

    arguments = {
        "f": f,
        "tokenizer": "LETTERS",
        "weights": draw.choice(
            ["None", f"[0.5] * {count}", f"torch.ones({count})", f"(2,) * {count}"]
        ),
    }
    wrong = {
        "f": ["None", "3", "[]", "'f'", "later", "[length, 3]", "only", "{}"],
        "tokenizer": ["None", "3", "'gpt2'"],
        "weights": [
            f"[1.0] * {count + 1}",
            "['x']",
            "3",
            "[math.nan]",
            "'ab'",
            "[None]",
            "{}",
            "[math.inf]",
        ],
    }
    alias = {
        "f": "function|TextReward|coroutine|position",
        "weights": "weight",
        "tokenizer": "tokenizer",
    }
    return Plan("TextReward", arguments, right, wrong, alias=alias)


@generator("rewards.score", 1.5)
def score(draw):
    B, T = draw.randint(1, 4), draw.randint(2, 6)

    def right(result, idx, completion_mask, **rest):
        expected = ((idx == 3) & completion_mask).sum(1)
        close(result.rewards, expected)

    written = f"torch.arange({T}).ge(1).expand({B}, {T})"
    arguments = {
        "reward_fn": "threes",
        "idx": draw.ids(B, T),
        "attention_mask": f"torch.ones({B}, {T}).bool()",
        "completion_mask": written,
        "tokenizer": draw.choice(["None", "LETTERS"]),
    }
    functions = ["raises", "too_many", "words", "nothing", "not_a_number", "scalar", "gold"]
    wrong = {
        "reward_fn": [
            *(f"TextReward({f}, LETTERS)" for f in functions),
            "None",
            "3",
            "length",
            "lambda *a: 1.0",
            "lambda *a: torch.ones(7, 7)",
            f"lambda *a: torch.full(({B},), math.inf)",
            "lambda *a: None",
            f"lambda *a: torch.ones({B}).to(torch.complex64)",
            "lambda *a: 1 / 0",
            "lambda *a: a[0].nope",
        ],
        "idx": ["None", "[[1, 2]]", "'abc'"],
        "attention_mask": ["None", f"bits(1, ({B}, {T + 1}))", "'x'"],
        "completion_mask": ["None", f"bits(1, ({B + 1}, {T}))", "'x'"],
        "columns": ["{'a': [1] * 99}", "3", "'x'", "{'completions': [1]}"],
    }
    wrong.pop("columns")
    alias = {
        "reward_fn": "reward|function",
        "idx": "idx|shape",
        "attention_mask": "mask|shape",
        "completion_mask": "mask|shape",
    }
    return Plan("rewards.score", arguments, right, wrong, alias=alias)


@generator("sample", 1.5)
def sample(draw):
    n = draw.randint(1, 3)

    def right(result, policy, prompts, n, tokenizer, max_new_tokens, **rest):
        assert len(result.texts) == len(prompts) * n == len(result.idx)
        from tests.fuzz_names import gpt

        for i in range(len(result.texts)):
            ids = result.idx[i][result.completion_mask[i]].tolist()
            assert 1 <= len(ids) <= max_new_tokens
            assert result.ended[i] == (ids[-1] == 10)
            assert result.texts[i] == tokenizer.decode([j for j in ids if j != 10])
        log_probs = gpt(1).log_probs(result.idx, result.attention_mask, rest["temperature"])
        at = result.completion_mask[:, 1:]
        close(result.log_probs[at], log_probs[at], 1e-3)

    arguments = {
        "policy": "gpt(1)",
        "prompts": draw.choice(["['ab', 'c']", "[[1, 2], [3]]", "['abc']"]),
        "n": str(n),
        "tokenizer": "LETTERS",
        "max_new_tokens": draw.choice(["1", "4"]),
        "temperature": draw.choice(["1.0", "0.7"]),
        "batch_size": draw.choice(["1", "2", "256"]),
        "reward_fn": draw.choice(["None", "threes"]),
        "seed": draw.choice(["0", "7"]),
    }
    wrong = {
        "policy": ["None", "'gpt2'", "3", "reward_model(1)", "nn.Linear(2, 2)"],
        "prompts": [
            "[]",
            "None",
            "'abc'",
            "[3]",
            "['']",
            "['xyz']",
            "[[99]]",
            "[None]",
            "[[-1]]",
            "3",
            "{'prompt': 'a'}",
        ],
        "n": ["0", "-1", "1.5", "'2'", "None", "True"],
        "tokenizer": ["None", "3", "'gpt2'"],
        "max_new_tokens": ["0", "None", "'3'", "1.5"],
        "temperature": ["-1", "None", "'x'", "math.nan"],
        "stop_token": ["'x'", "[]", "99", "1.5", "-1"],
        "stop_strings": ["'ab'", "['']", "[3]", "None", "3", "[None]"],
        "reward_fn": ["3", "'x'", "lambda *a: 1.0", "lambda *a: 1 / 0"],
        "seed": ["None", "'x'", "1.5", "2**64", "[1]"],
        "batch_size": ["0", "None", "1.5"],
    }
    alias = {
        "prompts": "prompt|row|character|ids|idx",
        "policy": "policy|generate",
        "reward_fn": "reward_fn",
        "tokenizer": "tokenizer",
        "max_new_tokens": "max_new_tokens|new ones",
    }
    return Plan("sample", arguments, right, wrong, alias=alias, raises=("RewardError",))


SAMPLES = [
    "drawn = sample(gpt(1), ['ab', 'c'], n=2, tokenizer=LETTERS, max_new_tokens=4, "
    "reward_fn=threes)",
    "bare = sample(gpt(1), ['ab', 'c'], n=2, tokenizer=LETTERS, max_new_tokens=4)",
]


@generator("evaluation.kl")
def kl(draw):
    def right(result, samples, reference):
        from tests.fuzz_names import gpt

        other = gpt(2) if reference is gpt(2) else gpt(1)
        difference = samples.log_probs - other.log_probs(samples.idx, samples.attention_mask)
        at = samples.completion_mask[:, 1:]
        close(result, (difference.detach() * at).nan_to_num().sum(1).mean(), 1e-3)

    wrong = {
        "samples": ["None", "['ab']", "3", "drawn.texts"],
        "reference": ["None", "'gpt2'", "3", "reward_model(1)", "nn.Linear(2, 2)"],
        "temperature": ["0", "None", "'x'", "-1"],
        "batch_size": ["0", "None", "'x'", "-1", "1.5"],
    }
    arguments = {"samples": "drawn", "reference": draw.choice(["gpt(1)", "gpt(2)"])}
    return Plan(
        "kl",
        arguments,
        right,
        wrong,
        SAMPLES,
        {"samples": "Samples|samples", "reference": "reference|log_probs"},
    )


@generator("evaluation.score")
def score_samples(draw):
    def right(result, samples, reward_fn, batch_size):
        assert torch.equal(result, samples.rewards)

    wrong = {
        "samples": ["None", "['ab']", "3"],
        "reward_fn": ["None", "3", "lambda *a: 1.0", "lambda *a: 1 / 0", "'x'"],
        "batch_size": ["0", "None", "'x'", "-1", "1.5"],
    }
    arguments = {
        "samples": "drawn",
        "reward_fn": "threes",
        "batch_size": draw.choice(["1", "3", "99"]),
    }
    return Plan(
        "evaluate_score",
        arguments,
        right,
        wrong,
        SAMPLES,
        {"samples": "Samples|samples", "reward_fn": "reward_fn"},
    )


@generator("best_of_each")
def best_of_each(draw):
    n = draw.choice([1, 2, 4])

    def right(result, samples, n):
        rewards = samples.rewards.view(-1, n)
        assert torch.equal(result.rewards, rewards.max(1).values)

    wrong = {
        "samples": ["bare", "None", "3", "['ab']"],
        "n": ["0", "3", "None", "'x'", "1.5", "-1"],
    }
    return Plan(
        "best_of_each",
        {"samples": "drawn", "n": str(n)},
        right,
        wrong,
        SAMPLES,
        {"samples": "Samples|samples|rewards"},
    )


# --------------------------------------------------------------------------------------------------
# Stages


@generator("Stages")
def stages(draw):
    def right(result, **rest):
        assert result.names == ["sft"] and not result.finished("sft")

    arguments = {
        "config": "stages_config()",
        "folder": "FOLDER / 'run'",
        "order": "{'sft': Trainer}",
    }
    wrong = {
        "config": [
            "None",
            "{}",
            "CfgNode()",
            "stages_config(batch_size=0)",
            "stages_config(typo=1)",
            "stages_config(lr_schedule='x')",
            "without(stages_config(), 'sft')",
            "'x'",
        ],
        "order": ["None", "{'x': Trainer}", "{}", "['sft']", "{'sft': GPT}", "{'sft': 3}", "'sft'"],
        "folder": ["None", "3", "['x']"],
        "sections": ["{'x': ['y']}", "{'sft': ['missing']}", "3"],
        "extras": ["{'x': ['y']}", "{'sft': ['no_such']}", "3"],
        "overrides": ["{'x': {}}", "{'sft': {'typo': 1}}", "3"],
        "base": ["FOLDER / 'missing'", "3"],
    }
    alias = {
        "config": "config|sft|option|stage",
        "order": "order|stage|section",
        "folder": "folder|path",
        "sections": "section|stage",
        "extras": "extras|stage|option",
        "overrides": "overrides|typo",
        "base": "base|missing",
    }
    return Plan("Stages", arguments, right, wrong, alias=alias)
