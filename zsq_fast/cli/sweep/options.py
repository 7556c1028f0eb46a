"""What `--vary` says. Without torch, so that a typing error is answered at once."""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass

PLAN = "plan.json"  # says that a directory holds a sweep


@dataclass(frozen=True)
class Option:
    """Recipe options that take their values together.

    Attributes:
        text: what was typed.
        keys: "section.option" of each, usually one.
        values: per point one text per key, as `--set` takes it.
    """

    text: str
    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]


def option(text: str) -> Option:
    """An argparse type: "A.B=1,2,3", or "A.B:C.D=1:0,1:3" for options that change together."""
    left, _, right = text.partition("=")
    keys = tuple(key.strip() for key in left.split(":"))
    values = tuple(tuple(_split(value, ":")) if len(keys) > 1 else (value,) for value in _split(right, ","))
    if not all(key.count(".") == 1 and all(key.split(".")) for key in keys) or not all(map(all, values)):
        raise ArgumentTypeError(f"'{text}' is not section.option=value,value or section.a:section.b=1:0,1:3")
    if len(set(keys)) < len(keys):
        raise ArgumentTypeError(f"'{text}' names an option twice")
    wrong = next((value for value in values if len(value) != len(keys)), None)
    if wrong is not None:
        raise ArgumentTypeError(f"'{':'.join(wrong)}' has {len(wrong)} values for the {len(keys)} options {left}")
    return Option(text, keys, values)


def _split(text: str, at: str) -> list[str]:
    """The parts of a text, split where the separator is in neither brackets nor quotes, without the spaces around them."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[]":
            depth += 1 if char == "[" else -1
        if char == at and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]
