"""Command lines whose mistakes are told in one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn

from pagedattn.report.values import ResultsError


class Parser(argparse.ArgumentParser):
    """Raises what argparse finds wrong, instead of printing how the command is used."""

    def error(self, message: str) -> NoReturn:
        """Raise ResultsError."""
        raise ResultsError(f"{message}; --help shows what is allowed.")
