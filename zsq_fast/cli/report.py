"""zsq-fast report: one self-contained page of a run, or of several beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zsq_fast.cli.arguments import Parser


def run(words: Sequence[str]) -> int:
    parser = Parser("report", "Write one page (HTML, opens from disk, loads nothing) of finished runs.")
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the directory of a finished run, or a record of benchmarks.cifar10 (.json); several are compared",
    )
    add(
        "-o",
        "--out",
        default="report.html",
        metavar="FILE",
        help="the page; figures and numbers go beside it (report.html)",
    )
    add("--title", default="", help="heading of the page")
    add("--json", action="store_true", help="print the paths as JSON")
    arguments = parser.parse(words)
    from zsq_fast.report import write_report

    page, folder = write_report([Path(run) for run in arguments.runs], Path(arguments.out), arguments.title)
    if arguments.json:
        print(json.dumps({"page": str(page), "files": str(folder)}, indent=1))
    else:
        print(f"{page} ({page.stat().st_size / 1e6:.2f} MB); figures and numbers: {folder}")
    return 0
