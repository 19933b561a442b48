"""A folder that gets all files of a command, or stays as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pagedattn.report.values import ResultsError

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


def require_folder(out: Path, name: str = "The output folder") -> None:
    """Raise ResultsError if nothing could be written into a folder later on; makes none.

    Args:
        out: the folder, which need not exist.
        name: what the sentence begins with.

    """
    if out.exists() and not out.is_dir():
        raise ResultsError(f"{name} {out} is a file.")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = error.strerror or error
        raise ResultsError(f"{name} {out} cannot be written: {reason}.") from None


def plot_files(out: Path, plots: Iterable[str]) -> list[Path]:
    """Return the files in `out` that `write_into` may replace or remove for these plots."""
    return [out / f"{plot}.{suffix}" for plot in plots for suffix in FORMATS]


def require_no_source(targets: Iterable[Path | None], sources: Iterable[Path]) -> None:
    """Raise ResultsError if a file to be written is one that is read, or two are the same."""
    read = {Path(os.path.realpath(path)) for path in sources}
    written: set[Path] = set()
    for path in targets:
        if path is None:
            continue
        real = Path(os.path.realpath(path))
        if real in read:
            raise ResultsError(f"{path} is read: what is written needs another name.")
        if real in written and not (real.exists() and not real.is_file()):
            raise ResultsError(f"{path} cannot be two files that are written.")
        written.add(real)


def write_file(path: Path, text: str) -> None:
    """Write a text file whole, through links, or leave what was there.

    What is no ordinary file, such as ``/dev/stdout``, is written as it is. Raises ResultsError.
    """
    real = Path(os.path.realpath(path))
    made = None
    try:
        if real.exists() and not real.is_file():
            real.write_text(text, encoding="utf-8", newline="\n")
            return
        if real.exists() and not os.access(real, os.W_OK):
            raise PermissionError(13, "Permission denied")
        descriptor, name = tempfile.mkstemp(prefix=f".{real.name[:50]}-", dir=real.parent)
        made = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(real.stat().st_mode if real.exists() else 0o666 & ~mask)
        made.replace(real)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ResultsError(f"{path} cannot be written ({reason}).") from None
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


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
    new = not out.exists()
    out.mkdir(exist_ok=True)
    if not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied")
    ours = plot_files(out, plots)
    stale = [path.name for path in ours if path.name not in names and path.is_file()]
    replaced = folder / "replaced"
    replaced.mkdir()
    aside: list[str] = []
    put: list[str] = []
    try:
        for name in [*names, *stale]:
            if os.path.lexists(out / name):
                shutil.move(out / name, replaced / name)
                aside.append(name)
        for name in names:
            put.append(name)
            shutil.move(folder / name, out / name)
    except BaseException:
        for name in put:
            (out / name).unlink(missing_ok=True)
        for name in aside:
            shutil.move(replaced / name, out / name)
        if new:
            out.rmdir()
        raise
    return stale
