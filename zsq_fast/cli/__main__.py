"""`python -m zsq_fast.cli`, for environments whose scripts are not on PATH."""

import sys

from zsq_fast.cli import main

sys.exit(main())
