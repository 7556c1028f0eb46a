"""For pytest: this checkout at the end of sys.path, so that `benchmarks` is found here and zsq_fast where it is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
