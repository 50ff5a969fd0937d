"""
Options: a tree of them, the command line that overrides them, and checks of their values.
"""

import ast
import difflib
import math
import numbers
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any


class CfgNode:
    """A tree of options with attribute access: `config.trainer.max_iters`. Leaves are plain Python values.

    `merge_from_args(["--trainer.max_iters=10"])` overrides from the command line; what does not exist or fit raises ValueError.
    """

    if TYPE_CHECKING:  # the options' names and types are known at run time only
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, **options):
        for name, value in options.items():
            setattr(self, name, CfgNode(**value) if isinstance(value, dict) else value)

    def __str__(self):
        return "\n".join(f"{name} = {value!r}" for name, value in self.leaves())

    def __eq__(self, other):
        return isinstance(other, CfgNode) and self.to_dict() == other.to_dict()

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Every option as (dotted name, value), in the order of definition."""
        for name, value in vars(self).items():
            if isinstance(value, CfgNode):
                yield from value.leaves(f"{prefix}{name}.")
            else:
                yield prefix + name, value

    def to_dict(self) -> dict:
        """The tree as nested dicts, ready for JSON."""
        return {k: v.to_dict() if isinstance(v, CfgNode) else v for k, v in vars(self).items()}

    def merge_from_dict(self, options: dict) -> None:
        """Set top-level attributes, new ones included."""
        vars(self).update(options)

    def merge_from_args(self, args: list[str]) -> None:
        """Override options: `--section.key=value` or `--section.key value`, with Python literals or else strings; `--flag` is True."""
        args, known = list(args), dict(self.leaves())
        while args:
            arg = args.pop(0)
            name, equals, text = arg.removeprefix("--").partition("=")
            if not equals:
                text = "True" if isinstance(known.get(name), bool) else args.pop(0) if args else None
            if not arg.startswith("--") or text is None:
                raise ValueError(f"argument {arg!r} is not of the form --option=value")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean --{near[0]}?" if near else ""
                raise ValueError(f"unknown option --{name}{hint} (--help lists all)")
            *path, leaf = name.split(".")
            node = self
            for part in path:
                node = getattr(node, part)
            setattr(node, leaf, parse_option(name, text, known[name]))


def parse_option(name: str, text: str, default: Any) -> Any:
    """The value that `text` means for an option with this default: same type, but int -> float, and None takes anything."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, str):
        return text
    if default is None or value is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(default)(value)
    raise ValueError(f"--{name}={text} must be of type {type(default).__name__}, like its default {default!r}")


def check_numbers(
    config: Any,
    *names: str,
    low: float = 0,
    high: float = math.inf,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """ValueError for the first of the named options that is not a number in [low, high].

    whole: it must be an integer. optional: None is allowed, too. Infinity and NaN never are.
    """
    kind: type = numbers.Integral if whole else numbers.Real
    for name in names:
        value = getattr(config, name)
        if optional and value is None:
            continue
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value == math.inf:
            noun = "whole number" if whole else "number"
            alternative = " or None" if optional else ""
            raise ValueError(f"{name}={value!r} must be a {noun} in [{low}, {high}]{alternative}")


def parse_args(config: CfgNode, args: list[str], about: str) -> None:
    """Merge a script's command line into config; `--help` prints `about` and every option, and exits."""
    if "--help" in args or "-h" in args:
        options = "\n".join(f"  --{name}={value}" for name, value in config.leaves())
        sys.stdout.write(f"{about.strip()}\n\nOptions and their defaults:\n{options}\n")
        sys.exit(0)
    config.merge_from_args(args)
