"""Load published request traces: when each request came, and how long it was.

Two formats are recognised by their first line:

- Azure's CSV (Azure/AzurePublicDataset, with Splitwise, ISCA 2024):
  ``TIMESTAMP,ContextTokens,GeneratedTokens``, with 7 fractional digits in the time stamps;
- Mooncake's JSON lines (kvcache-ai/Mooncake, FAST 2025): ``timestamp`` in milliseconds,
  ``input_length``, ``output_length`` and ``hash_ids``, one for each 512-token block of the prompt.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from reprlib import repr as short_repr
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

MOONCAKE_BLOCK_TOKENS = 512
"""How many prompt tokens one of Mooncake's hashes stands for; the last may stand for fewer."""

_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_AZURE_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,9}))?", re.ASCII)
_AZURE_COUNT = re.compile(r"\d{1,18}", re.ASCII)


class TraceError(ValueError):
    """A trace cannot be read; the message names the line."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    ``arrival_s`` is in seconds from the trace's start. Prompts that start with the same
    ``prefix_hashes`` start with the same blocks; it is empty where the trace has none.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()


def load_trace(path: str | PathLike[str]) -> list[Request]:
    """Read an Azure CSV or a Mooncake JSON lines file, whichever its first line shows it to be.

    Azure's arrivals count from its first request, Mooncake's from its own zero. Blank lines are
    skipped. Raises :class:`TraceError` for a file that cannot be read, is neither, has no request,
    or has a bad line: lengths under 1, or an arrival earlier than the one before.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:  # any line ending, a byte order mark or not
            lines = _Lines(path.name, file)
            first = next(lines, None)
            if first is None:
                raise TraceError(f"{path.name} must hold requests, but it is empty.")
            if first.startswith("{"):
                requests = list(_mooncake(lines, first))
            elif first.split(",") == _AZURE_HEADER:
                requests = list(_azure(lines))
            else:
                raise lines.error(
                    f"the first line must be the header {','.join(_AZURE_HEADER)} or a JSON "
                    f"object, not {short_repr(first)}"
                )
    except OSError as error:
        raise TraceError(f"{path} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path.name} must be UTF-8 text, but it is not ({error}).") from error
    if not requests:
        raise TraceError(f"{path.name} must hold requests, but it has only a header.")
    return requests


class _Lines:
    """The lines of a file that are not blank, stripped, with the current one's number."""

    def __init__(self, name: str, lines: Iterator[str]) -> None:
        self._name = name
        self._numbered = enumerate(lines, start=1)
        self._number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        for number, line in self._numbered:
            self._number = number
            if stripped := line.strip():
                return stripped
        raise StopIteration

    def error(self, sentence: str) -> TraceError:
        return TraceError(f"{self._name}, line {self._number}: {sentence}.")

    def check_order(self, arrival_s: float, previous_s: float) -> None:
        if arrival_s < previous_s:
            raise self.error(
                f"a request must not arrive before the one above it, "
                f"not at {arrival_s:g} s after {previous_s:g} s"
            )


def _azure(lines: _Lines) -> Iterator[Request]:
    start: tuple[datetime, int] | None = None
    previous_s = 0.0
    for line in lines:
        fields = line.split(",")
        if len(fields) != 3:
            raise lines.error(f"it must have 3 fields, not {len(fields)}")
        at, nanoseconds = _azure_time(lines, fields[0])
        start = start or (at, nanoseconds)
        # Whole seconds and fractions apart: a float of both would lose the last digits.
        arrival_s = (at - start[0]).total_seconds() + (nanoseconds - start[1]) / 1e9
        lines.check_order(arrival_s, previous_s)
        previous_s = arrival_s
        prompt, output = (
            _length(lines, key, int(field) if _AZURE_COUNT.fullmatch(field) else field)
            for key, field in zip(_AZURE_HEADER[1:], fields[1:], strict=True)
        )
        yield Request(arrival_s, prompt, output)


def _azure_time(lines: _Lines, stamp: str) -> tuple[datetime, int]:
    """Split ``2023-11-16 18:15:46.6805900`` into its second and its nanoseconds."""
    match = _AZURE_TIME.fullmatch(stamp)
    try:
        if match:
            at = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S")
            return at, int((match[2] or "").ljust(9, "0"))
    except ValueError:  # a month 13, an hour 25
        pass
    raise lines.error(
        f"TIMESTAMP must be like 2023-11-16 18:15:46.6805900, not {short_repr(stamp)}"
    )


def _mooncake(lines: _Lines, line: str | None) -> Iterator[Request]:
    previous_s = 0.0
    while line is not None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise lines.error(f"it must be a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise lines.error(f"it must be a JSON object, not {short_repr(row)}")
        for key in ("timestamp", "input_length", "output_length"):
            if key not in row:
                raise lines.error(f"{key} is missing")
        milliseconds = row["timestamp"]
        if (
            isinstance(milliseconds, bool)
            or not isinstance(milliseconds, int | float)
            or not 0 <= milliseconds < 2**53
        ):
            raise lines.error(
                f"timestamp must be milliseconds, 0 or more, not {short_repr(milliseconds)}"
            )
        arrival_s = milliseconds / 1000
        lines.check_order(arrival_s, previous_s)
        previous_s = arrival_s
        prompt = _length(lines, "input_length", row["input_length"])
        output = _length(lines, "output_length", row["output_length"])
        yield Request(arrival_s, prompt, output, _hashes(lines, row.get("hash_ids", []), prompt))
        line = next(lines, None)


def _hashes(lines: _Lines, hashes: object, prompt_tokens: int) -> tuple[int, ...]:
    if not isinstance(hashes, list) or not all(type(value) is int for value in hashes):
        raise lines.error(f"hash_ids must be a list of integers, not {short_repr(hashes)}")
    num_blocks = -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS)
    if len(hashes) not in (0, num_blocks):
        raise lines.error(
            f"hash_ids must hold {num_blocks} ids for {prompt_tokens} tokens, not {len(hashes)}"
        )
    return tuple(hashes)


def _length(lines: _Lines, key: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise lines.error(f"{key} must be an integer, 1 or more, not {short_repr(value)}")
    return value
