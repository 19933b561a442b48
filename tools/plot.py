#!/usr/bin/env python3
"""Draw benchmark results: plots, a report and tables. See ``python tools/plot.py --help``."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.report.cli import main

if __name__ == "__main__":
    sys.exit(main())
