"""The command `zsq-fast`. Torch is imported by the verbs that need it, so `--help` and typing errors answer at once."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from zsq_fast import __version__
from zsq_fast.cli.arguments import HelpShown
from zsq_fast.errors import Interrupted, UsageError, ZsqError, nearest

# verb: (module with `run(argv) -> exit code`, help)
VERBS = {
    "quantize": ("zsq_fast.cli.quantize", "quantize a network without data"),
    "synthesize": ("zsq_fast.cli.synthesize", "make the optimised images of a recipe, for runs to come"),
    "resume": ("zsq_fast.cli.resume", "continue a run that was stopped"),
    "evaluate": ("zsq_fast.cli.evaluate", "accuracy of a run or a network on real test images"),
    "analyze": (
        "zsq_fast.cli.analyze",
        "look into a finished run: layers, samples, gradients, curvature, loss surface, forecast of the accuracy drop",
    ),
    "watch": ("zsq_fast.cli.watch", "follow a run in the terminal, from another one"),
    "reproduce": ("zsq_fast.cli.reproduce", "train a row of a paper's table and set it beside the published number"),
    "sweep": ("zsq_fast.cli.sweep", "train with several values of recipe options: one table, one plot"),
    "report": ("zsq_fast.cli.report", "write one page (HTML) of a finished run, or of several beside each other"),
    "recipes": ("zsq_fast.cli.recipes", "list the methods"),
    "demo": ("zsq_fast.cli.demo", "train a small network on handwritten digits, quantize it, print the table"),
    "env": ("zsq_fast.cli.environment", "versions, kernels and what to do about missing ones"),
}

_HELP = """usage: zsq-fast VERB [options]        `zsq-fast VERB --help` explains one verb

{verbs}

options of every verb:
  --debug     show the traceback of an error

exit codes: 0 done, 1 unexpected error, 2 wrong usage, 3 unsupported network, 4 bad file, 5 training failed,
            6 no kernels for the device, 7 forecast above the limit, 74 output not writable or disk full,
            130 interrupted (143 by SIGTERM)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Results go to stdout, everything else to stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller: `>&-`
            setattr(sys, stream, open(os.devnull, "w"))
    logging.basicConfig(format="zsq-fast: %(message)s")
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning
            code = _dispatch(words)
            sys.stdout.flush()
            return code
    except HelpShown:
        return 0
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if debug:
            traceback.print_exc()
        return _explain(error)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP.format(verbs="\n".join(f"  {verb:<12}{text}" for verb, (_, text) in VERBS.items())))
        return 0 if words else UsageError.exit_code
    if words[0] == "--version":
        print(f"zsq-fast {__version__}")
        return 0
    if words[0] not in VERBS:
        raise UsageError(f"there is no verb '{words[0]}'.{nearest(words[0], VERBS)}")
    return int(importlib.import_module(VERBS[words[0]][0]).run(words[1:]) or 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"zsq-fast: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _explain(error: BaseException) -> int:
    """One line on stderr; the exit code."""
    if isinstance(error, OSError) and not isinstance(error, ZsqError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from zsq_fast.runs import storage_error

        error = storage_error(error, error.filename or "the output")
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("interrupted.")
    if isinstance(error, Interrupted):
        print(f"zsq-fast: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, ZsqError):
        print(f"zsq-fast: error: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    # torch has a class of its own for a full GPU only
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "DefaultCPUAllocator" in str(error):
        text = "not enough memory; use smaller batches: --set schedule.batch_size=N, or --batch-size N of `evaluate`."
    else:
        text = f"unexpected {type(error).__name__}: {_one_line(error)[:300]} (--debug shows the traceback)"
    print(f"zsq-fast: error: {text}", file=sys.stderr)
    return 1
