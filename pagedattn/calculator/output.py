"""Write a calculation's files: all of them, or none."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pagedattn.config import ConfigError
from pagedattn.report.output import require_no_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pagedattn.calculator.result import Calculation


def check_outputs(
    out: Path, formats: tuple[str, ...], json_path: Path | None, sources: Iterable[Path]
) -> None:
    """Raise :class:`ConfigError` if the files could not be written; writes nothing.

    So that a mistake is told before the calculation, not after it. Raises
    :class:`pagedattn.report.values.ResultsError` if one of them is one of the sources.
    """
    targets = [] if json_path is None else [json_path]
    require_no_source([*targets, *(out / name for name in plot_names(formats))], sources)
    if json_path is not None:
        real = _real(json_path)
        special = real.exists() and not real.is_file()  # a folder, a device, a pipe
        if special or not json_path.name or not _can_hold_files(real.parent):
            raise ConfigError(
                f"--json must be a file in a folder that can be written, not {str(json_path)!r}."
            )
    if not formats:
        return
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not _can_hold_files(there):
        raise ConfigError(f"--out must be a folder that can be written, not {out}.")
    try:
        importlib.import_module("pagedattn.calculator.plot")
    except ImportError as error:
        raise ConfigError(
            f"the plot needs matplotlib ({error}): pip install 'pagedattn[plot]', or --no-plot."
        ) from None


def plot_names(formats: Iterable[str]) -> list[str]:
    """Return the names of the files that the plot is written to."""
    return [f"benchmark_results.{suffix}" for suffix in formats]


def _real(path: Path) -> Path:
    """Follow links, so that what a link points to is written and the link stays."""
    return Path(os.path.realpath(path))


def _can_hold_files(folder: Path) -> bool:
    """Whether a file can be made in a folder: tried, as permissions do not say all."""
    if not folder.is_dir():
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def write_outputs(
    result: Calculation, out: Path, formats: tuple[str, ...], json_path: Path | None
) -> list[str]:
    """Write plot and JSON beside their places, then move them there; return their paths.

    Raises :class:`ConfigError`, having written nothing, if that fails.
    """
    moves: list[tuple[Path, Path]] = []
    with _told(), tempfile.TemporaryDirectory() as name:
        made = Path(name)
        if formats:
            from pagedattn.calculator.plot import write_plot

            moves += [(made / file, out / file) for file in write_plot(result, made, formats)]
        if json_path is not None:
            text = json.dumps(result.to_json(), indent=2, allow_nan=False)
            (made / "json").write_text(f"{text}\n", encoding="utf-8", newline="\n")
            moves.append((made / "json", json_path))
        _move_all(moves)
    return [str(target) for _, target in moves]


def _move_all(moves: list[tuple[Path, Path]]) -> None:
    """Copy each file beside its place, then rename all; a failed copy leaves nothing behind."""
    placed: list[tuple[Path, Path]] = []
    folders: list[Path] = []
    try:
        for source, named in moves:
            target = _real(named)
            if target.exists() and not target.is_file():
                raise OSError(errno.EINVAL, "is no file", str(named))
            missing = [path for path in target.absolute().parents if not path.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            folders += missing
            beside = target.with_name(f".{target.name}.new")
            placed.append((beside, target))
            shutil.copyfile(source, beside)
    except BaseException:
        for beside, _ in placed:
            beside.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()
        raise
    for beside, target in placed:
        beside.replace(target)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{error.filename} " if error.filename else ""
        reason = error.strerror or str(error)
        raise ConfigError(f"{what}cannot be written: {reason}.") from None
