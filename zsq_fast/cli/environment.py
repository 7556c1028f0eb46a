"""zsq-fast env: versions, kernels, devices."""

from __future__ import annotations

from collections.abc import Sequence

from zsq_fast.cli.arguments import Parser


def run(words: Sequence[str]) -> int:
    parser = Parser("env", "Show versions, the kernels that were built, and how to get the missing ones.")
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    arguments = parser.parse(words)
    from zsq_fast.cli.env import print_report

    print_report(arguments.json)
    return 0
