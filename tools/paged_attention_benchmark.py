#!/usr/bin/env python3
"""Calculate what a paged KV cache saves; ``python tools/paged_attention_benchmark.py --help``."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.calculator.cli import main

if __name__ == "__main__":
    sys.exit(main())
