"""
Options: a tree of them, the command line that overrides them, and checks of their values.

A script builds a tree of defaults, then merges its command line into it:

    config = CfgNode(seed=3407, trainer={"max_iters": 100})
    parse_args(config, ["--trainer.max_iters=10"], about="what the script does")
    config.trainer.max_iters    # 10

An option exists when the tree of defaults has it, so a typo is an error and not a new option. Its
default also fixes its type. The name and the idea of CfgNode are minGPT's.
"""

import ast
import difflib
import math
import numbers
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any


class CfgNode:
    """A tree of options with attribute access: `config.trainer.max_iters`.

    A leaf is a plain Python value. A dict among the arguments becomes a subtree.
    """

    if TYPE_CHECKING:  # type checkers cannot see the options, which only exist at run time

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, **options: Any):
        for name, value in options.items():
            setattr(self, name, CfgNode(**value) if isinstance(value, dict) else value)

    def __str__(self) -> str:
        return "\n".join(f"{name} = {value!r}" for name, value in self.leaves())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CfgNode) and self.to_dict() == other.to_dict()

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Every option as (dotted name, value), in the order of definition."""
        for name, value in vars(self).items():
            if isinstance(value, CfgNode):
                yield from value.leaves(f"{prefix}{name}.")
            else:
                yield prefix + name, value

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested dicts."""
        return {
            name: value.to_dict() if isinstance(value, CfgNode) else value
            for name, value in vars(self).items()
        }

    def merge_from_dict(self, options: dict[str, Any]) -> None:
        """Set attributes of this node. Names that it does not have yet are added."""
        vars(self).update(options)

    def merge_from_args(self, args: list[str]) -> None:
        """Override existing options from a command line.

        An option is `--section.name=value` or `--section.name value`, and a bare `--flag` is True.
        `parse_option` says what a value means. Raises ValueError for an argument of another form,
        for an option that does not exist, and for a value of the wrong type.
        """
        defaults = dict(self.leaves())
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
    for name in names:
        value = getattr(config, name)  # a Python number, or one of NumPy's
        if optional and value is None:
            continue
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value in (math.inf, -math.inf):
            noun = "whole number" if whole else "number"
            alternative = " or None" if optional else ""
            raise ValueError(f"{name}={value!r} must be a {noun} in [{low}, {high}]{alternative}")


def parse_args(config: CfgNode, args: list[str], about: str) -> None:
    """Merge a script's command line into config.

    With `--help` or `-h` print `about` and every option with its default, and exit.
    """
    if "--help" in args or "-h" in args:
        options = "\n".join(f"  --{name}={value}" for name, value in config.leaves())
        sys.stdout.write(f"{about.strip()}\n\nOptions and their defaults:\n{options}\n")
        sys.exit(0)
    config.merge_from_args(args)
