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


def whole(text: str, least: int, below: int, allowed: str) -> int:
    """Return a whole number from `least` on and `below` another; `allowed` says so in the error.

    Raises:
        argparse.ArgumentTypeError: it is none, which argparse shows.

    """
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < below:
        raise argparse.ArgumentTypeError(f"must be {allowed}, not {text!r}")
    return value


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    return whole(text, 1, 2**31, "a whole number of 1 or more")


def count(text: str) -> int:
    """Return a whole number from 0 on."""
    return whole(text, 0, 2**31, "a whole number of 0 or more")
