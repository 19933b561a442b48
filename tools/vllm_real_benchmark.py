#!/usr/bin/env python3
"""Run real inference on vLLM and measure; ``python tools/vllm_real_benchmark.py --help``."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
