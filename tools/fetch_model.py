#!/usr/bin/env python3
"""Get a small real model without a model hub; ``python tools/fetch_model.py --help``."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn.models.cli import main

if __name__ == "__main__":
    sys.exit(main(root=Path(__file__).resolve().parents[1]))
