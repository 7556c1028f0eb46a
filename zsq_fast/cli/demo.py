"""zsq-fast demo: hands over to zsq_fast.demo, which has its own options."""

from __future__ import annotations

from collections.abc import Sequence


def run(words: Sequence[str]) -> int:
    from zsq_fast.demo import main

    return int(main(list(words)) or 0)
