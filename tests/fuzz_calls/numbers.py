"""Estimators, losses and statistics, against loops over Python's own floats."""

import math
import statistics

import numpy as np
import torch

from tests.fuzz import Draw, Plan, generator

# What somebody may pass where a tensor is meant, and the library must not take.
NOT_TENSORS = ["[[0.5, 1.0]]", "None", "'abc'", "3.5", "[]"]


def close(result, expected, tolerance=1e-4):
    """AssertionError unless a result is the expected one, to float32's digits."""
    result = torch.as_tensor(result, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert result.shape == expected.shape, f"shape {result.shape}, not {expected.shape}"
    limit = tolerance * (1 + expected.abs())
    assert ((result - expected).abs() <= limit).all(), f"expected {expected.tolist()}"


def rows(*tensors):
    """The rows of tensors, as lists of floats, side by side."""
    return list(zip(*(x.double().tolist() for x in tensors), strict=True))


def mean(values):
    """The mean, 0 of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def on_mask(x, mask):
    """The entries of x on the mask, as floats."""
    return [a for row, bits in rows(x, mask) for a, bit in zip(row, bits, strict=True) if bit]


def wrong_masks(B, T):
    """Masks that do not suit (B, T)."""
    masks = [
        f"bits(1, ({T},))",
        f"bits(1, ({B}, 1), torch.float32)",
        f"bits(1, ({B}, {T + 1}))",
        f"torch.full(({B}, {T}), 0.5)",
        f"torch.full(({B}, {T}), 2)",
        f"torch.full(({B}, {T}), -1)",
        f"torch.full(({B}, {T}), math.nan)",
    ]
    if T == 1:
        masks.remove(f"bits(1, ({B}, 1), torch.float32)")  # this one does suit
    return masks + NOT_TENSORS


def wrong_floats(B, T):
    """Tensors that do not suit (B, T)."""
    return [f"floats(1, ({B}, {T + 2}))", f"floats(1, ({B + 1}, {T}))", *NOT_TENSORS]


SHAPE = r"shape|tensor|mask|equal"


def sizes(draw: Draw):
    """A small (B, T)."""
    return draw.randint(1, 5), draw.randint(1, 7)


@generator("masked")
def masked(draw):
    B, T = sizes(draw)

    def right(result, x, mask):
        expected = [
            [a if bit else 0.0 for a, bit in zip(*pair, strict=True)] for pair in rows(x, mask)
        ]
        close(result, expected)

    arguments = {"x": draw.floats(B, T), "mask": draw.mask(B, T)}
    wrong = {"x": wrong_floats(B, T), "mask": wrong_masks(B, T)}
    return Plan("masked", arguments, right, wrong, alias={"x": SHAPE, "mask": SHAPE})


@generator("masked_mean")
def masked_mean(draw):
    B, T = sizes(draw)
    dim = draw.choice([None, 0, 1, -1])

    def right(result, x, mask, dim):
        if dim is None:
            close(result, mean(on_mask(x, mask)))
            return
        if dim == 0:
            x, mask = x.t(), mask.t()
        close(result, [mean(on_mask(a[None], m[None])) for a, m in zip(x, mask, strict=True)])

    arguments = {"x": draw.floats(B, T), "mask": draw.mask(B, T), "dim": repr(dim)}
    wrong = {"x": wrong_floats(B, T), "mask": wrong_masks(B, T), "dim": ["2", "-3", "'x'", "0.5"]}
    return Plan("masked_mean", arguments, right, wrong, alias={"x": SHAPE, "mask": SHAPE})


@generator("masked_whiten")
def masked_whiten(draw):
    B, T = sizes(draw)

    def right(result, x, mask, shift_mean):
        values = on_mask(x, mask)
        center = mean(values)
        spread = mean((a - center) ** 2 for a in values)
        expected = [
            [
                (a - center) / math.sqrt(spread + 1e-8) + (0 if shift_mean else center)
                if bit
                else 0
                for a, bit in zip(*pair, strict=True)
            ]
            for pair in rows(x, mask)
        ]
        close(result, expected, 1e-3)

    arguments = {
        "x": draw.floats(B, T),
        "mask": draw.mask(B, T),
        "shift_mean": repr(draw.likely(0.5)),
    }
    wrong = {"x": wrong_floats(B, T), "mask": wrong_masks(B, T)}
    return Plan("masked_whiten", arguments, right, wrong, alias={"x": SHAPE, "mask": SHAPE})


@generator("written_mask")
def written_mask(draw):
    B, T = sizes(draw)
    stop = draw.choice(["None", "3", "[3, 5]", "(1, 2)"])

    def right(result, idx, prompt_length, stop_token):
        stops = [] if stop_token is None else np.atleast_1d(stop_token).tolist()
        for row, bits in zip(idx.tolist(), result.tolist(), strict=True):
            ended = False
            for t, token in enumerate(row):
                expected = t >= prompt_length and not ended
                ended = ended or (expected and token in stops)
                assert bits[t] == expected

    arguments = {
        "idx": draw.ids(B, T),
        "prompt_length": str(draw.randint(0, T)),
        "stop_token": stop,
    }
    wrong = {
        "idx": [*NOT_TENSORS, f"floats(1, ({B}, {T}))", f"ids(1, ({T},))"],
        "prompt_length": ["-1", str(T + 1), "1.5", "'1'", "None", "True"],
        "stop_token": ["'x'", "1.5", "[1.5]", "['a']", "[]", "{}", "True"],
    }
    return Plan("written_mask", arguments, right, wrong, alias={"idx": "LongTensor|tensor"})


@generator("kl_estimate")
def kl_estimate(draw):
    B, T = sizes(draw)

    def right(result, log_probs, ref_log_probs, kind):
        def estimate(p, q):
            log_r = q - p
            table = {"k1": -log_r, "k2": log_r**2 / 2, "k3": math.exp(log_r) - 1 - log_r}
            return table[kind]

        expected = [
            [estimate(p, q) for p, q in zip(*pair, strict=True)]
            for pair in rows(log_probs, ref_log_probs)
        ]
        close(result, expected)

    arguments = {
        "log_probs": draw.floats(B, T),
        "ref_log_probs": draw.floats(B, T),
        "kind": repr(draw.choice(["k1", "k2", "k3"])),
    }
    wrong = {
        "log_probs": wrong_floats(B + 1, T + 1),
        "ref_log_probs": [
            *wrong_floats(B, T),
            f"floats(1, ({T + 1},))",
            f"floats(1, ({B}, {T}, 1))",
        ],
        "kind": ["'k4'", "None", "1", "'K1'", "['k1']"],
    }
    return Plan("kl_estimate", arguments, right, wrong, alias=dict.fromkeys(arguments, SHAPE))


@generator("gae", 2)
def gae(draw):
    B, T = sizes(draw)

    def right(result, rewards, values, mask, gamma, lam):
        advantages, returns = result
        for b in range(B):
            expected = [0.0] * T
            next_value = next_advantage = 0.0
            for t in reversed(range(T)):
                if not mask[b, t]:
                    next_value = next_advantage = 0.0
                    continue
                v = values[b, t].item()
                delta = rewards[b, t].item() + gamma * next_value - v
                next_advantage = delta + gamma * lam * next_advantage
                next_value = v
                expected[t] = next_advantage
            close(advantages[b], expected)
            bits = mask[b].bool()
            close(returns[b], torch.where(bits, torch.tensor(expected) + values[b], 0.0))

    # The completion's tokens are adjacent.
    arguments = {
        "rewards": draw.floats(B, T),
        "values": draw.floats(B, T),
        "mask": f"padding({draw.number()}, ({B}, {T}))",
        "gamma": draw.choice(["1.0", "0.9", "0.0", "1", "np.float64(0.5)"]),
        "lam": draw.choice(["1.0", "0.95", "0.0", "np.float32(0.5)"]),
    }
    wrong = {
        "rewards": wrong_floats(B, T),
        "values": wrong_floats(B, T),
        "mask": wrong_masks(B, T),
        "gamma": ["'1'", "None", "2.0", "-0.1", "math.nan"],
        "lam": ["'1'", "None", "1.5", "-1", "math.inf"],
    }
    alias = dict.fromkeys(("rewards", "values", "mask"), SHAPE)
    return Plan("gae", arguments, right, wrong, alias=alias)


@generator("shaped", 2)
def shaped(draw):
    B, T = sizes(draw)

    def right(result, rewards, potentials, mask, gamma):
        for b in range(B):
            expected = [0.0] * T
            following = 0.0  # the potential after the last token
            for t in reversed(range(T)):
                if mask[b, t]:
                    phi = potentials[b, t].item()
                    expected[t] = rewards[b, t].item() + gamma * following - phi
                    following = phi
                else:
                    following = 0.0
            close(result[b], expected)

    # The completion's tokens are adjacent.
    arguments = {
        "rewards": draw.floats(B, T),
        "potentials": draw.floats(B, T),
        "mask": f"padding({draw.number()}, ({B}, {T}))",
        "gamma": draw.choice(["1.0", "0.9", "0.0", "1", "np.float64(0.5)"]),
    }
    wrong = {
        "rewards": wrong_floats(B, T),
        "potentials": wrong_floats(B, T),
        "mask": wrong_masks(B, T),
        "gamma": ["'1'", "None", "2.0", "-0.1", "math.nan"],
    }
    alias = dict.fromkeys(("rewards", "potentials", "mask"), SHAPE)
    return Plan("shaped", arguments, right, wrong, alias=alias)


def group_plan(draw, function, expected_of_group):
    """The three estimators of groups."""
    size = draw.randint(2, 4)
    groups = draw.randint(1, 4)
    equal = draw.likely(0.25)
    scores = draw.floats(size * groups)
    if equal:
        value = draw.choice([0.1, 0.3, 1.7, -2.3])
        scores = f"torch.full(({size * groups},), {value})"

    def right(result, scores, group_size):
        if equal:
            assert (result == 0).all(), "equal scores must give exactly 0"
        expected = []
        for i in range(0, len(scores), group_size):
            expected += expected_of_group(scores[i : i + group_size].double().tolist())
        close(result, expected, 1e-3)

    arguments = {"scores": scores, "group_size": str(size)}
    wrong = {
        "scores": [
            *NOT_TENSORS,
            f"floats(1, ({size * groups + 1},))",
            "floats(1, (2, 2, 2))",
            f"floats(1, ({size}, {size}))",
            "floats(1, ())",
        ],
        "group_size": ["0", "1", "-2", "2.0", "'2'", "None", str(size * groups + 3), "math.nan"],
    }
    return Plan(function, arguments, right, wrong, alias={"scores": "scores|tensor"})


@generator("rloo_advantages")
def rloo_advantages(draw):
    def expected(group):
        others = (sum(group) - s for s in group)
        return [s - o / (len(group) - 1) for s, o in zip(group, others, strict=True)]

    return group_plan(draw, "rloo_advantages", expected)


@generator("group_mean_advantages")
def group_mean_advantages(draw):
    return group_plan(draw, "group_mean_advantages", lambda group: [s - mean(group) for s in group])


@generator("grpo_advantages")
def grpo_advantages(draw):
    def expected(group):
        spread = statistics.stdev(group)
        return [(s - mean(group)) / (spread + 1e-8) if spread > 1e-12 else 0.0 for s in group]

    return group_plan(draw, "grpo_advantages", expected)


@generator("ppo_policy_loss", 3)
def ppo_policy_loss(draw):
    B, T = sizes(draw)
    clip = draw.choice(["0.2", "(0.2, 0.3)", "0.0", "[0.1, 0.4]", "np.float64(0.3)"])

    def right(
        result,
        log_probs,
        old_log_probs,
        advantages,
        mask,
        clip_range,
        ratio,
        loss_mean,
        max_new_tokens,
    ):
        loss, fraction = result
        below, above = clip_range if isinstance(clip_range, (tuple, list)) else [clip_range] * 2
        sums, counts, clipped, tokens = [], [], 0, 0
        for p, q, a, m in rows(log_probs, old_log_probs, advantages, mask):
            on = [t for t in range(T) if m[t]]
            if not on:
                continue
            logs = {t: p[t] - q[t] for t in on}
            if ratio == "sequence":
                logs = dict.fromkeys(on, mean(logs.values()))
            terms = []
            for t in on:
                rho = math.exp(logs[t])
                free, bound = rho * a[t], min(max(rho, 1 - below), 1 + above) * a[t]
                terms.append(min(free, bound))
                clipped += bound < free - 1e-6
                tokens += 1
            sums.append(sum(terms))
            counts.append(len(terms))
        if not sums:
            expected = 0.0
        elif loss_mean == "token":
            expected = -sum(sums) / sum(counts)
        elif loss_mean == "sequence":
            expected = -mean(s / n for s, n in zip(sums, counts, strict=True))
        else:
            expected = -mean(s / max_new_tokens for s in sums)
        close(loss, expected, 1e-3)
        assert abs(fraction.item() - clipped / max(tokens, 1)) < 0.51 / max(tokens, 1) + 1e-6

    arguments = {
        "log_probs": draw.floats(B, T),
        "old_log_probs": draw.floats(B, T),
        "advantages": draw.floats(B, T),
        "mask": draw.mask(B, T),
        "clip_range": clip,
        "ratio": repr(draw.choice(["token", "sequence"])),
        "loss_mean": repr(draw.choice(["token", "sequence", "constant"])),
        "max_new_tokens": str(draw.randint(1, 8)),
    }
    wrong = {
        **dict.fromkeys(("log_probs", "old_log_probs", "advantages"), wrong_floats(B, T)),
        "mask": wrong_masks(B, T),
        "clip_range": [
            "-0.1",
            "None",
            "'0.2'",
            "(0.1,)",
            "(0.1, 0.2, 0.3)",
            "math.nan",
            "True",
            "(0.1, None)",
            "{}",
        ],
        "ratio": ["'words'", "None", "1", "['token']"],
        "loss_mean": ["'words'", "None", "1", "['token']"],
    }
    if "constant" in arguments["loss_mean"]:
        wrong["max_new_tokens"] = ["None", "0", "-1", "'4'", "1.5", "math.nan"]
    alias = dict.fromkeys(("log_probs", "old_log_probs", "advantages", "mask"), SHAPE)
    return Plan("ppo_policy_loss", arguments, right, wrong, alias=alias)


@generator("value_loss")
def value_loss(draw):
    B, T = sizes(draw)

    def right(result, values, old_values, returns, mask, clip_range):
        terms = []
        for v, o, r, m in rows(values, old_values, returns, mask):
            for t in range(T):
                if m[t]:
                    moved = o[t] + min(max(v[t] - o[t], -clip_range), clip_range)
                    terms.append(max((v[t] - r[t]) ** 2, (moved - r[t]) ** 2))
        close(result, mean(terms) / 2)

    arguments = {
        "values": draw.floats(B, T),
        "old_values": draw.floats(B, T),
        "returns": draw.floats(B, T),
        "mask": draw.mask(B, T),
        "clip_range": draw.choice(["0.2", "0.0", "5", "np.float64(0.3)"]),
    }
    wrong = {
        **dict.fromkeys(("values", "old_values", "returns"), wrong_floats(B, T)),
        "mask": wrong_masks(B, T),
        "clip_range": ["-0.1", "None", "'0.2'", "math.nan", "(0.1, 0.2)", "True"],
    }
    alias = dict.fromkeys(("values", "old_values", "returns", "mask"), SHAPE)
    return Plan("value_loss", arguments, right, wrong, alias=alias)


@generator("average")
def average(draw):
    B, T = sizes(draw)

    def right(result, x, mask, loss_mean, max_new_tokens):
        sums = [[a for a, m in zip(*pair, strict=True) if m] for pair in rows(x, mask)]
        sums = [row for row in sums if row]
        if loss_mean == "token":
            expected = mean(a for row in sums for a in row)
        elif loss_mean == "sequence":
            expected = mean(mean(row) for row in sums)
        else:
            expected = mean(sum(row) / max_new_tokens for row in sums)
        close(result, expected)

    arguments = {
        "x": draw.floats(B, T),
        "mask": draw.mask(B, T),
        "loss_mean": repr(draw.choice(["token", "sequence", "constant"])),
        "max_new_tokens": str(draw.randint(1, 8)),
    }
    wrong = {
        "x": wrong_floats(B, T),
        "mask": wrong_masks(B, T),
        "loss_mean": ["'words'", "None", "0"],
    }
    return Plan("average", arguments, right, wrong, alias={"x": SHAPE, "mask": SHAPE})


# --------------------------------------------------------------------------------------------------
# Comparisons


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x


def flat(*tensors):
    """The entries of tensors, broadcast against each other, as tuples of floats."""
    return list(
        zip(
            *(x.double().flatten().tolist() for x in torch.broadcast_tensors(*tensors)), strict=True
        )
    )


def pair_shapes(draw):
    """Shapes of chosen and rejected: equal, or one against many."""
    B, K = draw.randint(1, 4), draw.randint(1, 3)
    return draw.choice([((B,), (B,)), ((B, 1), (B, K))])


def wrong_pairs(shape):
    """What does not go with the other one of a pair."""
    other = f"floats(1, ({shape[0] + 1},))" if len(shape) == 1 else "floats(1, (9, 2))"
    column = [f"floats(1, ({shape[0]}, 1))"] if len(shape) == 1 else ["floats(1, (8,))"]
    return [other, *column, *NOT_TENSORS]


@generator("reward_loss")
def reward_loss(draw):
    one, many = pair_shapes(draw)

    def right(result, chosen, rejected, margin):
        terms = [-log_sigmoid(c - r - margin) for c, r in flat(chosen, rejected)]
        close(result, mean(terms))

    arguments = {
        "chosen": draw.floats(*one),
        "rejected": draw.floats(*many),
        "margin": draw.choice(["0.0", "1", "0.5", "np.float32(0.25)"]),
    }
    wrong = {
        "chosen": wrong_pairs(many),
        "rejected": wrong_pairs(one),
        "margin": ["'1'", "None", "math.nan", "math.inf", "[1.0]"],
    }
    return Plan("reward_loss", arguments, right, wrong, alias=dict.fromkeys(arguments, SHAPE))


def preference_plan(draw, function, right):
    """dpo_loss and ipo_loss."""
    one, many = pair_shapes(draw)
    arguments = {
        "chosen_log_probs": draw.floats(*one),
        "rejected_log_probs": draw.floats(*many),
        "ref_chosen_log_probs": draw.floats(*one),
        "ref_rejected_log_probs": draw.floats(*many),
        "beta": draw.choice(["0.1", "1", "0.5", "np.float64(0.2)"]),
    }
    wrong = {
        **{
            name: wrong_pairs(many if "rejected" in name else one)
            for name in arguments
            if "log_probs" in name
        },
        "beta": ["0", "-0.1", "'1'", "None", "math.nan", "math.inf"],
    }
    # A column against (B,) must be refused; between (B, 1) and (B, K) it may be right.
    wrong["chosen_log_probs"] = wrong_pairs(many)
    alias = {name: f"{SHAPE}|chosen|rejected" for name in arguments if name != "beta"}
    return Plan(function, arguments, right, wrong, alias=alias)


@generator("dpo_loss")
def dpo_loss(draw):
    def right(result, beta, **log_probs):
        terms = [
            -log_sigmoid(beta * ((c - rc) - (r - rr))) for c, r, rc, rr in flat(*log_probs.values())
        ]
        close(result, mean(terms))

    return preference_plan(draw, "dpo_loss", right)


@generator("ipo_loss")
def ipo_loss(draw):
    def right(result, beta, **log_probs):
        terms = [
            ((c - rc) - (r - rr) - 1 / (2 * beta)) ** 2
            for c, r, rc, rr in flat(*log_probs.values())
        ]
        close(result, mean(terms))

    return preference_plan(draw, "ipo_loss", right)


@generator("simpo_loss")
def simpo_loss(draw):
    one, many = pair_shapes(draw)

    def right(result, beta, gamma, **tensors):
        terms = [
            -log_sigmoid(beta * (c / nc - r / nr) - gamma)
            for c, r, nc, nr in flat(*tensors.values())
        ]
        close(result, mean(terms))

    arguments = {
        "chosen_log_probs": draw.floats(*one),
        "rejected_log_probs": draw.floats(*many),
        "chosen_lengths": f"1 + {draw.ids(*one)}",
        "rejected_lengths": f"1 + {draw.ids(*many)}",
        "beta": draw.choice(["2.0", "1", "0.5"]),
        "gamma": draw.choice(["1.0", "0", "0.5"]),
    }
    wrong = {
        "chosen_log_probs": wrong_pairs(many),
        "rejected_log_probs": wrong_pairs(one),
        "chosen_lengths": [*wrong_pairs(one), f"torch.zeros({one}, dtype=torch.long)"],
        "rejected_lengths": [*wrong_pairs(many), f"torch.zeros({many}, dtype=torch.long)"],
        "beta": ["0", "-0.1", "'1'", "None", "math.nan"],
        "gamma": ["'1'", "None", "math.nan", "math.inf"],
    }
    alias = {name: f"{SHAPE}|chosen|rejected|length" for name in arguments if "_" in name}
    return Plan("simpo_loss", arguments, right, wrong, alias=alias)


# --------------------------------------------------------------------------------------------------
# Statistics of evaluation.py

NO_SCORES = [
    "[]",
    "None",
    "'abc'",
    "[1.0, math.nan]",
    "[math.inf]",
    "[[1.0, 2.0]]",
    "3.0",
    "['a', 'b']",
    "{}",
    "[None, 1]",
    "torch.ones(2, 2)",
    "[[1.0], [1.0, 2.0]]",
]


def scores(draw, n=None):
    """Scores in one of the forms that people have."""
    n = n or draw.randint(1, 12)
    source = draw.floats(n)
    return draw.choice([source, f"{source}.tolist()", f"{source}.numpy()", f"{source}.double()"])


def doubles(scores):
    return [float(s) for s in scores]


@generator("tilted")
def tilted(draw):
    def right(result, scores, betas):
        values = doubles(scores)
        for i, beta in enumerate(np.atleast_1d(betas).tolist()):
            top = max(values)
            weights = [math.exp((s - top) / beta) for s in values]
            weights = [w / sum(weights) for w in weights]
            close(result.rewards[i], sum(w * s for w, s in zip(weights, values, strict=True)))
            kl = sum(w * math.log(w * len(values)) for w in weights if w > 0)
            close(result.kls[i], kl)
            close(result.effective_sample_sizes[i], 1 / sum(w * w for w in weights), 1e-3)

    arguments = {
        "scores": scores(draw),
        "betas": draw.choice(["0.5", "[0.1, 1.0, 10]", "2", "np.array([0.3])", "(1, 2)"]),
    }
    wrong = {
        "scores": NO_SCORES,
        "betas": [
            "0",
            "-1",
            "[1.0, 0.0]",
            "math.nan",
            "None",
            "'1'",
            "[]",
            "math.inf",
            "[[1.0]]",
            "{}",
        ],
    }
    return Plan("tilted", arguments, right, wrong)


@generator("kl_optimal")
def kl_optimal(draw):
    def right(result, scores, reward):
        values = doubles(scores)
        if reward <= mean(values):
            assert result == 0.0
        elif reward >= max(values):
            assert result is None
        else:
            assert 0 <= result <= math.log(len(values)) + 1e-6

    arguments = {"scores": scores(draw), "reward": draw.choice(["0.0", "0.5", "-3", "10", "1.0"])}
    wrong = {"scores": NO_SCORES, "reward": ["None", "'1'", "math.nan", "math.inf", "[1.0]"]}
    return Plan("kl_optimal", arguments, right, wrong)


@generator("best_of_n")
def best_of_n(draw):
    def right(result, scores, n):
        values = sorted(doubles(scores))
        N = len(values)
        expected = sum(s * (((k + 1) / N) ** n - (k / N) ** n) for k, s in enumerate(values))
        close(result[0], expected)
        close(result[1], math.log(n) - (n - 1) / n)

    arguments = {"scores": scores(draw), "n": str(draw.randint(1, 16))}
    wrong = {"scores": NO_SCORES, "n": ["0", "-1", "1.5", "'2'", "None", "True", "math.inf"]}
    return Plan("best_of_n", arguments, right, wrong)


@generator("win_rate")
def win_rate(draw):
    n = draw.randint(1, 12)

    def right(result, a, b, confidence):
        pairs = list(zip(doubles(a), doubles(b), strict=True))
        rate = mean(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs)
        close(result.rate, rate)
        assert 0 <= result.low <= result.rate <= result.high <= 1
        assert result.n == len(pairs)
        # The ends of Wilson's interval are z standard errors of their own from the rate.
        z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
        for end in (result.low, result.high):
            if 1e-9 < end < 1 - 1e-9:
                close(abs(rate - end), z * math.sqrt(end * (1 - end) / len(pairs)), 1e-6)

    arguments = {
        "a": scores(draw, n),
        "b": scores(draw, n),
        "confidence": draw.choice(["0.95", "0.5", "0.99"]),
    }
    wrong = {
        "a": [*NO_SCORES, f"floats(1, ({n + 1},))"],
        "b": [*NO_SCORES, f"floats(1, ({n + 1},))"],
        "confidence": ["0", "1", "-1", "95", "None", "'0.9'", "math.nan"],
    }
    return Plan("win_rate", arguments, right, wrong, alias={"a": "scores", "b": "scores"})


@generator("token_log_probs")
def token_log_probs(draw):
    B, T = sizes(draw)

    def right(result, logits, tokens, temperature):
        expected = (logits.double() / temperature).log_softmax(-1)
        close(result, expected.gather(2, tokens[:, :, None])[:, :, 0])

    arguments = {
        "logits": draw.floats(B, T, 7),
        "tokens": draw.ids(B, T, vocab=7),
        "temperature": draw.choice(["1.0", "0.5", "2"]),
    }
    wrong = {"tokens": [f"torch.full(({B}, {T}), 7)", f"torch.full(({B}, {T}), -100)"]}
    return Plan("token_log_probs", arguments, right, wrong, alias={"tokens": "ids"})


@generator("next_token_log_probs")
def next_token_log_probs(draw):
    B = draw.randint(1, 4)

    def right(result, logits, temperature, top_k, top_p):
        for row, log_p in zip(logits.double() / temperature, result, strict=True):
            probs = row.softmax(0)
            keep = torch.ones(len(row), dtype=torch.bool)
            if top_k is not None:
                keep &= row >= row.sort(descending=True).values[top_k - 1]
            if top_p is not None:
                kept = torch.where(keep, row, -math.inf).softmax(0)
                total = 0.0
                for i in kept.argsort(descending=True).tolist():
                    keep[i] &= total < top_p
                    total += kept[i].item()
            expected = torch.where(keep, probs, 0.0)
            close(log_p.exp(), expected / expected.sum(), 1e-3)

    arguments = {
        "logits": draw.floats(B, 9, scale=2.0),
        "temperature": draw.choice(["1.0", "0.5", "2"]),
        "top_k": draw.choice(["None", "1", "3", "9"]),
        "top_p": draw.choice(["None", "1.0", "0.5", "0.9", "0.01"]),
    }
    return Plan("next_token_log_probs", arguments, right)


@generator("shuffled")
def shuffled(draw):
    n = draw.choice([1, 2, 10, 1000, 2**22 + 1, 30_000_000])
    skip = draw.choice([0, 0, max(0, n - 5)])

    def right(result, n, seed, skip):
        result = [next(result) for _ in range(min(50, n - skip))]
        assert len(set(result)) == len(result) and min(result) >= 0 and max(result) < n
        if n <= 2**22:
            generator = torch.Generator().manual_seed(seed)
            expected = torch.randperm(n, generator=generator)[skip : skip + 50]
            assert result == expected.tolist()

    arguments = {"n": str(n), "seed": str(draw.number()), "skip": str(skip)}
    # Not a list of all of it: see `right`.
    return Plan(
        "(lambda **kw: [shuffle.shuffled(**kw)])",
        arguments,
        lambda result, **kw: right(result[0], **kw),
    )


@generator("hidden_states", 0.5)
def hidden_states(draw):
    """The trunk with a prefix that is read once, against the trunk without."""
    B, P, T, K = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 3)
    prompts = f"{draw.ids(B, P)}.repeat_interleave({K}, 0)"

    mask = (
        f"torch.cat([torch.ones({B * K}, {P}).bool(), padding({draw.number()}, ({B * K}, {T}))], 1)"
    )
    arguments = {
        "trunk": "gpt(3).transformer",
        "idx": f"torch.cat([{prompts}, {draw.ids(B * K, T)}], 1)",
        "attention_mask": mask,
        "prefix_length": str(P),
        "rows_per_prompt": str(K),
    }

    def right(result, trunk, idx, attention_mask, prefix_length, rows_per_prompt):
        real = attention_mask[:, prefix_length:]
        expected = trunk(idx, attention_mask)[:, prefix_length:]
        close(result[real], expected[real], 1e-3)

    return Plan("hidden_states", arguments, right)
