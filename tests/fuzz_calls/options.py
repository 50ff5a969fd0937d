"""Options, command lines, seeds, devices, optimizers."""

import ast

import torch

from tests.fuzz import Plan, generator


@generator("parse_option")
def parse_option(draw):
    text, default = draw.choice(
        [
            ("3", 1),
            ("-5", 1),
            ("0.5", 1.0),
            ("2", 1.0),
            ("True", False),
            ("abc", "x"),
            ("12", "x"),
            ("(1, 2)", (0, 0)),
            ("[1, 2]", (0, 0)),
            ("(1,)", [0]),
            ("None", 3),
            ("1e-3", 0.1),
            ("out/run", None),
            ("[1, 'a']", None),
            ("", "x"),
        ]
    )

    def right(result, name, text, default):
        if isinstance(default, str):
            assert result == text
            return
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if default is None or value is None:
            assert result == value
        else:
            assert type(result) is type(default) and result == type(default)(value)

    wrong = ["'x'", "'1.5'", "'True'", "'[1]'", "'{}'", "''"]
    if default is None or isinstance(default, str):
        wrong = []
    elif isinstance(default, bool):
        wrong = ["'1'", "'yes'", "'true'", "''"]
    elif isinstance(default, float):
        wrong = ["'x'", "'True'", "'[1]'", "''"]
    elif isinstance(default, (tuple, list)):
        wrong = ["'3'", "'x'", "'{}'", "''"]
    arguments = {"name": "'opt'", "text": repr(text), "default": repr(default)}
    return Plan(
        "parse_option", arguments, right, {"text": wrong} if wrong else {}, alias={"text": "opt"}
    )


TREE = "CfgNode(seed=1, rate=0.5, name='x', flag=False, trainer={'iters': 3, 'dir': None})"


@generator("merge_from_args", 2)
def merge_from_args(draw):
    options = [
        ("--seed=7", "seed", 7),
        ("--rate=2", "rate", 2.0),
        ("--name=3", "name", "3"),
        ("--flag", "flag", True),
        ("--flag=True", "flag", True),
        ("--trainer.iters=9", "trainer.iters", 9),
        ("--trainer.dir=out", "trainer.dir", "out"),
        ("--trainer.iters=None", "trainer.iters", None),
    ]
    chosen = draw.sample(options, draw.randint(0, 4))
    chosen = list({name: (arg, name, value) for arg, name, value in chosen}.values())
    args = [arg for arg, _, _ in chosen]

    def right(result, args):
        leaves = dict(result.leaves())
        expected = {
            "seed": 1,
            "rate": 0.5,
            "name": "x",
            "flag": False,
            "trainer.iters": 3,
            "trainer.dir": None,
        }
        expected |= {name: value for _, name, value in chosen}
        assert leaves == expected and list(map(type, leaves.values())) == [
            type(expected[name]) for name in leaves
        ]

    wrong = [
        "['--sed=1']",
        "['seed=1']",
        "['--seed']",
        "['--seed=x']",
        "['--trainer=3']",
        "['--trainer.iter=3']",
        "['--flag=1']",
        "['--']",
        "['']",
        "['--=3']",
        "[3]",
        "None",
        "'--seed=1'",
        "['--seed', '1.5']",
        "['--rate=True']",
        "['--trainer.iters.x=1']",
        "['-seed=1']",
    ]
    setup = [f"config = {TREE}", "merge = lambda args: config.merge_from_args(args) or config"]
    return Plan(
        "merge",
        {"_args": repr(args)},
        right,
        {"_args": wrong},
        setup,
        {"_args": "option|argument|must be|--"},
    )


@generator("CfgNode")
def plain_values(draw):
    source, expected = draw.choice(
        [
            ("np.float64(0.5)", 0.5),
            ("np.int64(3)", 3),
            ("Path('a/b')", "a/b"),
            ("np.bool_(True)", True),
            ("torch.device('cpu')", "cpu"),
            ("np.array([1, 2])", [1, 2]),
            ("torch.tensor(3)", 3),
            ("(np.float32(0.5), 1)", (0.5, 1)),
            ("[Path('x')]", ["x"]),
            ("None", None),
            ("'a'", "a"),
        ]
    )

    def right(result, value):
        assert result.value == expected and type(result.value) is type(expected)

    return Plan("CfgNode", {"value": source}, right)


@generator("check_numbers")
def check_numbers(draw):
    value = draw.choice(["1", "0.5", "np.float64(2)", "np.int32(3)", "0", "10"])
    wrong = {
        "_1config": [
            f"CfgNode(x={v})"
            for v in ("None", "'1'", "math.nan", "math.inf", "True", "-1", "11", "[1]", "{}", "1j")
        ]
        + ["CfgNode()", "CfgNode(y=1)"]
    }
    arguments = {"_1config": f"CfgNode(x={value})", "_2name": "'x'", "low": "0", "high": "10"}
    return Plan(
        "check_numbers",
        arguments,
        lambda result, **rest: None,
        wrong,
        alias={"_1config": "x=" + "|'x'"},
    )


@generator("check_booleans")
def check_booleans(draw):
    wrong = [f"CfgNode(x={v})" for v in ("None", "'True'", "1", "0", "[]", "1.0")] + ["CfgNode()"]
    arguments = {
        "_1config": draw.choice(["CfgNode(x=True)", "CfgNode(x=np.bool_(False))"]),
        "_2name": "'x'",
    }
    return Plan(
        "check_booleans",
        arguments,
        lambda result, **rest: None,
        {"_1config": wrong},
        alias={"_1config": "x=|'x'"},
    )


@generator("merge_from_dict")
def merge_from_dict(draw):
    arguments = {"_options": draw.choice(["{'a': 1}", "{}", "{'a': {'b': 2}, 'c': Path('x')}"])}
    wrong = {"_options": ["None", "3", "[1]", "'abc'", "{3: 4}", "[('a', 1)]"]}
    return Plan(
        "CfgNode().merge_from_dict",
        arguments,
        lambda result, options: None,
        wrong,
        alias={"_options": "option|name"},
    )


@generator("set_seed")
def set_seed(draw):
    seed = draw.choice([0, 1, 2**31, 2**63 - 1, 12345])

    def right(result, seed):
        first = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(first, torch.rand(3))

    wrong = ["None", "'1'", "1.5", "2**64", "[1]", "math.nan", "True"]
    arguments = {"_seed": draw.choice([str(seed), f"np.int64({seed})"])}
    return Plan("set_seed", arguments, right, {"_seed": wrong})


@generator("pick_device")
def pick_device(draw):
    def right(result, device):
        assert result.type == "cpu"

    wrong = [
        "'tpu'",
        "'cuda'",
        "'cuda:7'",
        "'mps'",
        "None",
        "3",
        "''",
        "['cpu']",
        "'cpu:x'",
        "'meta'",
        "math.nan",
        "b'cpu'",
    ]
    arguments = {"_device": draw.choice(["'cpu'", "'auto'", "torch.device('cpu')"])}
    if torch.cuda.is_available():
        wrong, arguments = ["'tpu'"], {"_device": "'cpu'"}
    return Plan("pick_device", arguments, right, {"_device": wrong}, alias={"_device": "device"})


@generator("pick_precision")
def pick_precision(draw):
    precision = draw.choice(["fp32", "bf16", "fp16", "auto"])

    def right(result, precision, device):
        assert result == ("fp32" if precision == "auto" else precision)

    wrong = {"_1precision": ["'fp8'", "None", "32", "''", "'FP32'", "['fp32']"]}
    arguments = {"_1precision": repr(precision), "_2device": "torch.device('cpu')"}
    return Plan("pick_precision", arguments, right, wrong, alias={"_1precision": "precision"})


@generator("adamw")
def adamw(draw):
    values = {
        "learning_rate": draw.choice(["1e-3", "0.0", "1"]),
        "betas": draw.choice(["(0.9, 0.95)", "[0.5, 0.9]", "(0, 0)"]),
        "eps": draw.choice(["1e-8", "1e-5"]),
        "weight_decay": draw.choice(["0.1", "0"]),
    }

    def right(result, **config):
        decayed = {id(p) for p in result.param_groups[0]["params"]}
        count = 0
        from tests.fuzz_names import gpt

        for name, p in gpt(0).named_parameters():
            is_matrix = p.dim() == 2 and ".wte." not in name and ".wpe." not in name
            assert (id(p) in decayed) == is_matrix, name
            count += 1
        assert count == sum(len(group["params"]) for group in result.param_groups)

    wrong = {
        "learning_rate": ["-1", "'x'", "None", "math.nan"],
        "betas": [
            "(0.9,)",
            "None",
            "(0.9, 1.0)",
            "'ab'",
            "0.9",
            "(0.9, None)",
            "(-0.1, 0.5)",
            "(0.1, 0.2, 0.3)",
        ],
        "eps": ["-1", "None", "'x'", "math.nan"],
        "weight_decay": ["-1", "None", "'x'", "math.inf"],
    }
    return Plan("(lambda **o: gpt(0).configure_optimizers(CfgNode(**o)))", values, right, wrong)


@generator("adamw(config)")
def adamw_without(draw):
    name = draw.choice(["learning_rate", "betas", "weight_decay"])
    good = "Trainer.get_default_config()"
    wrong = ["None", "{}", "'x'", "CfgNode()", f"without({good}, {name!r})"]
    return Plan(
        "gpt(0).configure_optimizers",
        {"_config": good},
        lambda result, config: None,
        {"_config": wrong},
        alias={"_config": "config|" + name},
    )


@generator("setup_logging")
def setup_logging(draw):
    good = "CfgNode(system={'work_dir': FOLDER / 'w'}, a=1)"
    wrong = ["CfgNode()", "CfgNode(system={'seed': 1})", "CfgNode(system=3)"]

    def right(result, config):
        from tests.fuzz_names import FOLDER

        assert (FOLDER / "w" / "config.json").exists()

    return Plan(
        "setup_logging_quietly",
        {"_config": good},
        right,
        {"_config": wrong},
        alias={"_config": "system|work_dir"},
    )


@generator("import_extra")
def import_extra(draw):
    wrong = {"module": ["'no_such_module'", "'no_such.module'"]}
    return Plan(
        "import_extra",
        {"module": "'json'", "extra": "'test'"},
        lambda result, **rest: result.dumps,
        wrong,
        alias={"module": "no_such"},
        raises=("ImportError",),
    )
