"""Argument parsing with one-sentence errors, and the types the verbs share."""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from zsq_fast.errors import UsageError, nearest


class HelpShown(Exception):
    """--help has been answered. Not SystemExit: that one only comes from a user's code."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, which raises UsageError and offers the nearest option or choice."""

    def __init__(self, verb: str, description: str):
        super().__init__(prog=f"zsq-fast {verb}", description=description, allow_abbrev=False)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        for word in words:
            self._check_text(word)
        for word in itertools.takewhile(lambda word: word != "--", words):
            if word.startswith("--"):  # a misspelt option is better news than the missing one it was meant to be
                self._check_known(word.split("=")[0])
        arguments, rest = self.parse_known_args(words)
        for word in rest:
            self._check_known(word)
            raise UsageError(f"{self.prog} does not know what to do with '{word}'; see {self.prog} --help.")
        return arguments

    def _check_text(self, word: str) -> None:
        """No shell passes such words on; a program that calls `main` may."""
        try:
            possible = b"\0" not in os.fsencode(word)
        except UnicodeEncodeError:
            possible = False
        if not possible:
            raise UsageError(f"{self.prog}: the argument {word!r} holds a character that no name of a file can hold.")

    def _check_known(self, name: str) -> None:
        if name.startswith("-") and name not in self._option_string_actions:
            raise UsageError(f"{self.prog} has no option '{name}'.{nearest(name, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help.")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise HelpShown

    def add_choice(self, *names: str, choices: Sequence[str], **options: object) -> None:
        def one_of(text: str) -> str:
            if text not in choices:
                raise argparse.ArgumentTypeError(f"'{text}' is unknown.{nearest(text, choices)}".rstrip("."))
            return text

        self.add_argument(*names, type=one_of, metavar="|".join(choices), **options)  # type: ignore[arg-type]

    def add_switch(self, name: str, help: str) -> None:
        """--name and --no-name; None when neither is given."""
        self.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=help)


def integer(low: int, high: float = math.inf, what: str = "number") -> Callable[[str], int]:
    """An argparse type: an integer in low..high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            span = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a {what} {span}")
        return value

    return parse


bits = integer(2, 8, "bit width")
seed = integer(0, 2**63 - 1, "seed")  # what every generator of torch takes


def input_size(text: str) -> tuple[int, int, int]:
    """ "3,32,32" -> (3, 32, 32)."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and 0 < int(part) < 1 << 16 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not channels,height,width such as 3,224,224")
    channels, height, width = map(int, parts)
    return channels, height, width


def numbers(text: str) -> tuple[float, ...]:
    """ "0.5,0.5,0.5" -> floats, all finite."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 0.485,0.456,0.406")
    return values


def device(text: str) -> str:
    kind, _, index = text.partition(":")
    if text not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is not auto, cpu, cuda or cuda:N")
    return text


def shard(text: str) -> tuple[int, int]:
    """ "1/4" -> (1, 4): the second of four parts."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts) < 1 << 16):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with I from 0 to N - 1, such as 0/4")
    return int(part), int(parts)


def add_job_options(parser: Parser, *, data: str, limit: str) -> None:
    """What the verbs that train share: network, schedule, machine, where images are kept, the test images by the names given."""
    add_network_options(parser)
    add = parser.add_argument
    add_images_option(parser)
    images = "real test images (.npz or a folder): printed, never used for decisions"
    add(data, dest="eval_data", metavar="PATH", help=images)
    few = "only N test images: the first, of a folder every so-manieth"
    add(limit, dest="eval_limit", type=integer(1), metavar="N", help=few)
    add("--mean", type=numbers, metavar="M,M,M", help="normalisation of the test images, pixels in 0..1")
    add("--std", type=numbers, metavar="S,S,S")


def add_images_option(parser: Parser) -> None:
    text = "take the optimised images from DIR, where `synthesize` keeps them, and make there what is missing"
    parser.add_argument("--images", metavar="DIR", help=text)


def add_network_options(parser: Parser) -> None:
    """What all that begins with a network and a recipe shares."""
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="trained weights: .safetensors, or .pt/.pth holding tensors only")
    add(
        "--num-classes", type=integer(1), metavar="N", help="outputs of the network, where it can be built with several"
    )
    add("--input-size", type=input_size, metavar="C,H,W", help="needed when the network does not tell")
    parser.add_choice("--schedule", choices=("paper", "short"), default="paper", help="how long to train (paper)")
    add("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="change one recipe setting")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N")
    add("--threads", type=integer(1, 1024), default=0, metavar="N", help="CPU threads (torch's choice)")
    parser.add_switch("--channels-last", help="memory format of the convolutions (chosen by device)")
    add("--dry-run", action="store_true", help="print the resolved plan, estimates of time and memory, and stop")
    add("--force", action="store_true", help="go on although the network looks untrained")
    add("--allow-import", action="store_true", help="allow the model to import and run your code")
    add("--quiet", action="store_true", help="no progress")
    add("--json", action="store_true", help="print the result as JSON")
