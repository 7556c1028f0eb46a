"""Measurements. `python -m benchmarks` puts this checkout first on sys.path; a source tree in which nothing was built must not hide the
installed zsq_fast, so it goes to the end."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
if not list((_ROOT / "zsq_fast").glob("_C.*")):
    _here = [p for p in sys.path if Path(p or ".").resolve() == _ROOT]
    sys.path[:] = [p for p in sys.path if p not in _here] + [str(_ROOT)]
