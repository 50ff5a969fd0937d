"""
Options: a tree of them, the command line that overrides them, and checks of their values.

A script builds a tree of defaults, then merges its command line into it:

    config = CfgNode(seed=3407, trainer={"max_iters": 100})
    parse_args(config, ["--trainer.max_iters=10"], about="what the script does")
    config.trainer.max_iters    # 10

An option exists when the tree of defaults has it, so a typo is an error and not a new option. Its
default also fixes its type. What it means stands as a comment beside the default, in the function
that makes the tree; `documented` reads these comments, and `--help`, `print(config)` and Python's
`help` show them. The name and the idea of CfgNode are minGPT's.
"""

import ast
import difflib
import enum
import functools
import inspect
import io
import math
import numbers
import os
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np


class CfgNode:
    """A tree of options with attribute access: `config.trainer.max_iters`.

    A leaf is a plain Python value. A dict among the arguments becomes a subtree.
    """

    # Slots, and so no options: {leaf: what it means}, and {leaf: the heading that it stands under}.
    __slots__ = ("__dict__", "_headings", "_meanings")
    _meanings: dict[str, str]
    _headings: dict[str, str]

    if TYPE_CHECKING:  # type checkers cannot see the options, which only exist at run time

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, **options: Any):
        self._meanings = {}
        self._headings = {}
        for name, value in options.items():
            setattr(self, name, CfgNode(**value) if isinstance(value, dict) else value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, plain(value))

    def __str__(self) -> str:
        return "\n".join(self.describe("{name} = {value!r}"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CfgNode) and self.to_dict() == other.to_dict()

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Every option as (dotted name, value), in the order of definition."""
        for name, value in vars(self).items():
            if isinstance(value, CfgNode):
                yield from value.leaves(f"{prefix}{name}.")
            else:
                yield prefix + name, value

    def describe(self, form: str, prefix: str = "") -> Iterator[str]:
        """A line for each option, in the given form, with its meaning; and the headings."""
        for name, value in vars(self).items():
            if name in self._headings:
                yield f"# {self._headings[name]}"
            if isinstance(value, CfgNode):
                yield from value.describe(form, f"{prefix}{name}.")
            else:
                option = form.format(name=prefix + name, value=value)
                meaning = self._meanings.get(name)
                yield f"{option:38}  # {meaning}" if meaning else option

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested dicts."""
        return {
            name: value.to_dict() if isinstance(value, CfgNode) else value
            for name, value in vars(self).items()
        }

    def merge_from_dict(self, options: dict[str, Any]) -> None:
        """Set attributes of this node. Names that it does not have yet are added.

        TypeError for what is no dict of options by name.
        """
        if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
            raise TypeError(f"options is {options!r:.60}; expected a dict, {{name: value}}")
        for name, value in options.items():
            setattr(self, name, value)

    def merge_from_args(self, args: list[str]) -> None:
        """Override existing options from a command line.

        An option is `--section.name=value` or `--section.name value`, and a bare `--flag` is True.
        `parse_option` says what a value means. Raises ValueError for an argument of another form,
        for an option that does not exist, and for a value of the wrong type.
        """
        defaults = dict(self.leaves())
        if isinstance(args, str) or not all(isinstance(arg, str) for arg in args):
            raise ValueError(f"argument {args!r:.60} must be a list of texts, as in sys.argv[1:]")
        remaining = list(args)
        while remaining:
            name, text = take_option(remaining, defaults)
            if name not in defaults:
                similar = difflib.get_close_matches(name, defaults, n=1, cutoff=0.5)
                hint = f"; did you mean --{similar[0]}?" if similar else ""
                raise ValueError(f"unknown option --{name}{hint} (--help lists all)")

            # Walk down to the node that holds the option: a.b.c is the leaf c of self.a.b.
            *sections, leaf = name.split(".")
            node = self
            for section in sections:
                node = getattr(node, section)
            setattr(node, leaf, parse_option(name, text, defaults[name]))


def plain(value: Any) -> Any:
    """The value as plain Python: what files can hold, and anybody can load and compare.

    A path and a torch.device become text, an enum its value. A number of NumPy's or PyTorch's
    becomes Python's, and an array of them a list. Other values stay as they are.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if hasattr(value, "tolist") and hasattr(value, "ndim"):  # an array, a tensor or one number
        return value.tolist()
    # Asked by name, so that a script's options do not wait for PyTorch to be imported.
    if f"{type(value).__module__}.{type(value).__name__}" == "torch.device":
        return str(value)
    return value


def take_option(args: list[str], defaults: dict[str, Any]) -> tuple[str, str]:
    """Remove the first option from args, and return its name and the text of its value.

    That is one argument (`--name=value`, or the bare `--flag` of an option that is True or False)
    or two (`--name value`). Raises ValueError for anything else.
    """
    arg = args.pop(0)
    name, equals_sign, text = arg.removeprefix("--").partition("=")
    is_flag = isinstance(defaults.get(name), bool)
    lacks_value = not equals_sign and not is_flag and not args
    if not arg.startswith("--") or lacks_value:
        raise ValueError(f"argument {arg!r} is not of the form --option=value")
    if equals_sign:
        return name, text
    if is_flag:
        return name, "True"
    return name, args.pop(0)


def parse_option(name: str, text: str, default: Any) -> Any:
    """The value that `text` means for an option with this default.

    Text is read as a Python literal where it is one, and else as a string. An option whose default
    is a string takes the text as it is, and one whose default is None takes any value. Otherwise
    the value must have the default's type, with three exceptions: an int may stand for a float, a
    tuple for a list and the other way round, and None for anything. Raises ValueError for another
    type.
    """
    if isinstance(default, str):
        return text  # --name=12 is the string "12"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # out/run-1, or any other word
    # Not isinstance: in Python True is an int, too, but --seed=True is a mistake.
    if default is None or value is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(default)(value)
    expected = type(default).__name__
    raise ValueError(f"--{name}={text} must be of type {expected}, like its default {default!r}")


def check_is_config(config: Any, owner: str) -> None:
    """TypeError for a config that is no CfgNode: a dict, say, or None."""
    if not isinstance(config, CfgNode):
        raise TypeError(
            f"the config is {type(config).__name__} {config!r:.60}; expected a CfgNode: begin with "
            f"{owner}.get_default_config()"
        )


def check_numbers(
    config: Any,
    *names: str,
    low: float = 0,
    high: float = math.inf,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Check that each of the named options is a number in [low, high].

    whole: it must be an integer. optional: None is allowed too. Infinity, NaN, True and False never
    are. Raises ValueError for the first option that fails.
    """
    kind: type = numbers.Integral if whole else numbers.Real
    check_present(config, names)
    for name in names:
        value = getattr(config, name)  # a Python number, or one of NumPy's
        if optional and value is None:
            continue
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value in (math.inf, -math.inf):
            noun = "whole number" if whole else "number"
            alternative = " or None" if optional else ""
            raise ValueError(f"{name}={value!r} must be a {noun} in [{low}, {high}]{alternative}")


def check_booleans(config: Any, *names: str) -> None:
    """ValueError for the first of the named options that is neither True nor False.

    Text such as "False" would count as true.
    """
    check_present(config, names)
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name}={value!r} must be True or False")


def check_present(config: Any, names: Iterable[str]) -> None:
    """ValueError for the options that a config lacks, by name."""
    missing = [name for name in names if not hasattr(config, name)]
    if missing:
        raise ValueError(f"the config lacks the options {missing}: begin with a default config")


def parse_args(config: CfgNode, args: list[str], about: str) -> None:
    """Merge a script's command line into config.

    With `--help` or `-h` print `about` and every option with its default, and exit.
    """
    if "--help" in args or "-h" in args:
        options = textwrap.indent("\n".join(config.describe("--{name}={value}")), "  ")
        sys.stdout.write(f"{about.strip()}\n\nOptions and their defaults:\n{options}\n")
        sys.exit(0)
    config.merge_from_args(args)


# --------------------------------------------------------------------------------------------------
# What options mean: the comments beside their defaults


def documented(get_config: Callable[..., CfgNode]) -> Callable[..., CfgNode]:
    """Decorator for a function that makes a tree of defaults and returns it.

    The comment behind a default becomes what the option means, and comment lines above it the
    heading of the options that follow. The function's docstring gets all of them, for `help`.
    """
    meanings, headings = read_comments(get_config)

    @functools.wraps(get_config)
    def with_meanings(*args: Any, **kwargs: Any) -> CfgNode:
        config = get_config(*args, **kwargs)
        for name, comment in meanings.items():
            attach(config, name, comment, heading=False)
        for name, comment in headings.items():
            attach(config, name, comment, heading=True)
        return config

    options = "\n".join(with_meanings().describe("{name} = {value!r}"))
    with_meanings.__doc__ = f"{inspect.getdoc(get_config)}\n\n{options}"
    return with_meanings


def attach(config: CfgNode, name: str, comment: str, heading: bool) -> None:
    """Give an option, by its dotted name, its meaning or its heading. It may have been deleted."""
    *sections, leaf = name.split(".")
    node: Any = config
    for section in sections:
        node = getattr(node, section, None)
    if isinstance(node, CfgNode):
        (node._headings if heading else node._meanings)[leaf] = comment


def read_comments(function: Callable) -> tuple[dict[str, str], dict[str, str]]:
    """({option: the comment behind it}, {option: the comment lines above it}) of a function.

    Options are what it assigns, as in `C.rl.max_iters = 200`, or passes, as in `CN(max_iters=200)`.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:
        return {}, {}  # no source file here
    behind, above = comments_by_line(source)
    meanings = {}
    headings = {}
    for node in ast.walk(ast.parse(source)):
        for name in assigned_options(node):
            assert isinstance(node, (ast.Assign, ast.keyword))
            if node.end_lineno in behind:
                meanings[name] = behind[node.end_lineno]
            if node.lineno in above:
                headings[name] = above[node.lineno]
    return meanings, headings


def assigned_options(node: ast.AST) -> list[str]:
    """The dotted names of the options that a piece of syntax sets: one, several or none."""
    if isinstance(node, ast.keyword) and node.arg is not None:
        return [node.arg]
    if isinstance(node, ast.Assign):
        targets = [target for target in node.targets if isinstance(target, ast.Attribute)]
        return [ast.unparse(target).partition(".")[2] for target in targets]
    return []


def comments_by_line(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """({line: the comment behind its code}, {line: the comment lines right above it})."""
    behind: dict[int, str] = {}
    above: dict[int, str] = {}
    block: list[str] = []  # comment lines since the last code
    last = (0, 0)  # line and column of the last comment behind code
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, column = token.start
        text = token.string.lstrip("# ")
        has_code = not token.line.strip().startswith("#")
        if token.type == tokenize.COMMENT and has_code:
            behind[line] = text
            last = (line, column)
        elif token.type == tokenize.COMMENT and not block and column == last[1]:
            behind[last[0]] += f" {text}"  # it continues the comment above it
        elif token.type == tokenize.COMMENT:
            block.append(text)
            above[line + 1] = " ".join(block)
        elif token.type != tokenize.NL:
            block = []
    return behind, above
