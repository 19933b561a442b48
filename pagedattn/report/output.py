"""A folder that gets all files of a command, or stays as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pagedattn.report.rows import ResultsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FORMATS = ("png", "svg")


def write_into(
    out: Path, plots: Iterable[str], make: Callable[[Path], object]
) -> tuple[list[str], list[str]]:
    """Let `make` write everything beside the output folder, then move it there.

    Args:
        out: the output folder, which need not exist.
        plots: names, without a suffix, of which older files go where `make` writes none such.
        make: writes files into the empty folder that it is given.

    Returns:
        The names of the files written, and of those of earlier runs that were removed.

    Raises:
        ResultsError: the folder cannot be used; nothing was changed.

    """
    real = Path(os.path.realpath(out))
    if real.exists() and not real.is_dir():
        raise ResultsError(f"The output folder {out} is a file.")
    made: list[Path] = []
    try:
        made = _make_folders(real.parent)
        with tempfile.TemporaryDirectory(prefix=f".{real.name}-", dir=real.parent) as name:
            folder = Path(name)
            make(folder)
            written = sorted(path.name for path in folder.iterdir())
            removed = _move(folder, written, plots, real)
            made = []
    except OSError as error:
        reason = f"{error.strerror or error}"
        raise ResultsError(f"The output folder {out} cannot be written: {reason}.") from None
    finally:
        with contextlib.suppress(OSError):
            for path in reversed(made):
                path.rmdir()
    return written, removed


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the new ones, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _move(folder: Path, names: list[str], plots: Iterable[str], out: Path) -> list[str]:
    """Move the named files into `out`; remove plots that an earlier run left, and name them."""
    for name in names:
        if (out / name).is_dir():
            raise ResultsError(f"{out / name} is a folder where a file must be written.")
    out.mkdir(exist_ok=True)
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied")
    for name in names:
        shutil.move(folder / name, out / name)
    ours = [f"{plot}.{suffix}" for plot in plots for suffix in FORMATS]
    stale = [name for name in ours if name not in names and (out / name).is_file()]
    for name in stale:
        (out / name).unlink()
    return stale
