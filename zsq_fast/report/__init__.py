"""One self-contained page of one run, or of several beside each other: `zsq-fast report`."""

from zsq_fast.report.page import write_report

__all__ = ["write_report"]
