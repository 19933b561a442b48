"""A block manager's whole state as a value: to print, to keep in a file, to load again."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedattn.block_manager.ragged import whole_number

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from numpy.typing import NDArray

FORMAT = 1
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FULL, _CACHED, _EMPTY, _DEFERRED = "█", "░", "·", "▒"
# what numpy, zipfile, zlib and json raise for files that are not what they should be
_UNREADABLE = (
    ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class SnapshotError(ValueError):
    """A file is not a snapshot of a block manager."""


@dataclass(frozen=True)
class Snapshot:
    """State of a `BlockManager` at one moment; nothing that happens later changes it.

    It holds the seed of the prefix hashes and digests of what was cached, though no tokens but
    those of partly filled blocks: treat a file of it like a dump of memory.

    Attributes:
        settings: constructor arguments and counters; plain JSON values.
        arrays: the arrays, by name.

    """

    settings: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a `.npz` file whole, which `load` and numpy read, or leave what was there.

        What is no ordinary file, and one in a folder that cannot be written, is written in place.

        Raises:
            OSError: it cannot be written.

        """
        arrays: dict[str, Any] = dict(self.arrays)
        arrays["settings"] = np.frombuffer(json.dumps(dict(self.settings)).encode(), np.uint8)
        real = Path(os.path.realpath(path))
        is_other = real.exists() and not (real.is_file() and os.access(real, os.W_OK))
        if is_other or not os.access(real.parent, os.W_OK | os.X_OK):
            with open(path, "wb") as file:  # as it is, if at all
                np.savez_compressed(file, **arrays)
            return
        # beside it first, as giving a file another's name on one disk is done whole or not at all
        with tempfile.TemporaryDirectory(prefix=".snapshot-", dir=real.parent) as folder:
            made = Path(folder) / "made"
            with made.open("wb") as file:
                np.savez_compressed(file, **arrays)
            if real.exists():
                made.chmod(real.stat().st_mode)
            made.replace(real)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Snapshot:
        """Read a file that `save` wrote.

        Raises:
            SnapshotError: it is no such file, or of another version.
            OSError: it cannot be read.

        """
        try:
            with open(path, "rb") as data:
                if not zipfile.is_zipfile(data):
                    raise ValueError("it is no .npz file")
                data.seek(0)
                with np.load(data, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
            settings = json.loads(arrays.pop("settings").tobytes())
            version = settings["format"]
        except KeyError as error:
            raise SnapshotError(f"{path} is not a block manager's snapshot: no {error}") from None
        except _UNREADABLE as error:
            raise SnapshotError(f"{path} is not a block manager's snapshot: {error}") from None
        if version != FORMAT:
            raise SnapshotError(f"{path} has format {version}; this version reads {FORMAT}")
        return cls(settings, arrays)

    def __str__(self) -> str:
        return self.draw()

    def draw(self, columns: int = 64) -> str:
        """Draw the pools, a character a block, for a terminal.

        A letter is a sequence group (in turn A to Z), small where its last block still has room;
        a digit is a block that several block tables name, and how many (9: nine or more). The
        host's pool follows the device's, if there is one.

        Args:
            columns: blocks a line, at least 1.

        """
        columns = whole_number(columns, "columns", 1)
        settings, arrays = self.settings, self.arrays
        num_blocks, num_host_blocks = settings["num_blocks"], settings["num_host_blocks"]
        cells = np.full(num_blocks, _EMPTY)
        cells[arrays["pool_cached"]] = _CACHED
        cells[arrays["pool_deferred"]] = _DEFERRED
        counts = arrays["pool_ref_counts"]
        used, num_swapped = int(np.count_nonzero(counts)), int(arrays["swapped"].sum())
        cached, deferred = arrays["pool_cached"].size, arrays["pool_deferred"].size
        title = (
            f"{num_blocks} blocks of {settings['block_size']} tokens: {used} used by "
            f"{arrays['num_tokens'].size - num_swapped} sequences, "
            f"{cached} cached {_CACHED}, {deferred} deferred {_DEFERRED}, "
            f"{num_blocks - used - cached - deferred} empty {_EMPTY}"
        )
        self._draw_tables(cells, counts, swapped=False)
        lines = [title, *_in_lines(cells, columns)]
        if num_host_blocks:
            cells = np.full(num_host_blocks, _EMPTY)
            counts = arrays["host_ref_counts"]
            self._draw_tables(cells, counts, swapped=True)
            used = int(np.count_nonzero(counts))
            lines.append(
                f"{num_host_blocks} blocks on the host: {used} used by {num_swapped} sequences"
            )
            lines += _in_lines(cells, columns)
        lines.append(
            "A-Z a sequence group, small where its last block has room; 2-9 named by so many tables"
        )
        return "\n".join(lines)

    def _draw_tables(
        self, cells: NDArray[np.str_], counts: NDArray[np.int32], *, swapped: bool
    ) -> None:
        """Draw into `cells` what the block tables name, on the host if `swapped`."""
        settings, arrays = self.settings, self.arrays
        groups = np.unique(arrays["group"])
        names = [_LETTERS[i % len(_LETTERS)] for i in range(groups.size)]
        ends = np.cumsum(arrays["list_ends"] - arrays["list_first"])
        lists = np.split(arrays["blocks"], ends[:-1]) if ends.size else []
        for number, blocks in enumerate(lists):
            sequence = number // len(settings["windows"])
            if bool(arrays["swapped"][sequence]) != swapped:
                continue
            name = names[int(np.searchsorted(groups, arrays["group"][sequence]))]
            cells[blocks] = name
            if arrays["num_tokens"][sequence] % settings["block_size"]:
                cells[blocks[-1:]] = name.lower()
        for block in np.flatnonzero(counts > 1):
            cells[block] = str(min(int(counts[block]), 9))


def _in_lines(cells: NDArray[np.str_], columns: int) -> list[str]:
    """Cut a pool's characters into lines that begin with the number of their first block."""
    width = len(str(cells.size - 1))
    lines = []
    for start in range(0, cells.size, columns):
        row = "".join(cells[start : start + columns])
        parts = " ".join(row[i : i + 8] for i in range(0, len(row), 8))
        lines.append(f"{start:>{width}} {parts}")
    return lines
