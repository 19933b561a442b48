"""Write a calculation's files: all of them, or none."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pagedattn.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagedattn.calculator.result import Calculation


def check_outputs(out: Path, formats: tuple[str, ...], json_path: Path | None) -> None:
    """Raise :class:`ConfigError` if the files could not be written; writes nothing.

    So that a mistake is told before the calculation, not after it.
    """
    if json_path is not None:
        folder = json_path.parent
        if json_path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--json must be a file in a folder that can be written, not {json_path}."
            )
    if not formats:
        return
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out must be a folder that can be written, not {out}.")
    try:
        importlib.import_module("pagedattn.calculator.plot")
    except ImportError as error:
        raise ConfigError(
            f"the plot needs matplotlib ({error}): pip install 'pagedattn[plot]', or --no-plot."
        ) from None


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
        for source, target in moves:
            if target.is_dir():
                raise IsADirectoryError(21, "is a folder", str(target))
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
