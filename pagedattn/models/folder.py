"""A folder that is complete and as it was written, or is not there.

A manifest in the folder holds the SHA-256 of every file and what they were made from. The files
are made beside the folder's place and renamed to it, the manifest last among them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MANIFEST = "fetched.json"

MODEL_FILES = frozenset(
    {
        MANIFEST,
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
)
"""Names that any supported version of transformers writes; a folder of others is not replaced."""

_SUFFIX = ".unfinished"
_STALE_SECONDS = 3600


class FetchError(RuntimeError):
    """The model cannot be fetched; the message is one sentence with the next step."""


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(folder: Path, recipe: Mapping[str, object]) -> bool:
    """Whether `folder` was made by `recipe` and every file still has its checksum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return (
            manifest["recipe"] == recipe
            and {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
            and all(sha256_of(folder / name) == checksum for name, checksum in files.items())
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def write_manifest(folder: Path, recipe: Mapping[str, object], packages: Mapping[str, str]) -> None:
    """Write the manifest of the files in `folder`; `packages` are the versions that made them."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    manifest = {"recipe": recipe, "packages": packages, "files": files}
    text = json.dumps(manifest, indent=2)
    (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8", newline="\n")


def check_place(out: Path, room: int = 0) -> Path:
    """Return the real path of `out`; raise :class:`FetchError` if no model may be put there.

    `room` is how many bytes its disk must have free. A folder that holds anything but a model's
    files is never replaced. Changes nothing.
    """
    real = Path(os.path.realpath(out))
    with _told(out):
        if real.exists() and not real.is_dir():
            raise FetchError(f"--out must be a folder, but {out} is a file; name another.")
        if Path.cwd().is_relative_to(real):
            raise FetchError(
                f"--out must not be the folder you are in, nor one above it; name a new folder "
                f"instead of {out}."
            )
        names = {path.name for path in real.iterdir()} if real.exists() else set()
        others = sorted(names - MODEL_FILES)
        if others:
            raise FetchError(
                f"{out} is not a complete model and holds {others[0]}, which this tool did not "
                f"write; move that away or name another folder with --out."
            )
        above = next(path for path in real.parents if path.exists())
        if not above.is_dir():
            raise FetchError(f"--out must be a folder, but {above} is a file; name another.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        free = shutil.disk_usage(above).free
        if free < room:
            raise FetchError(
                f"{out} needs {room / 1e6:.0f} MB while it is made, but its disk has "
                f"{free / 1e6:.0f} MB free; make room or name another folder with --out."
            )
    return real


@contextlib.contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out`, removed at the end; files in it can be renamed to `out`.

    Folders above `out` are made, and removed again if nothing was put into them. What a killed
    run left there more than an hour ago is removed too.

    Raises:
        FetchError: something cannot be written.

    """
    real = Path(os.path.realpath(out))
    missing = [path for path in real.parents if not path.exists()]
    try:
        with _told(out):
            real.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(real)
            with tempfile.TemporaryDirectory(
                prefix=f".{real.name}-", suffix=_SUFFIX, dir=real.parent
            ) as name:
                yield Path(name)
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def publish(made: Path, out: Path) -> None:
    """Rename the folder `made` to `out`; a folder already there is put beside `made` first.

    If the second renaming fails, the old folder is put back.
    """
    real = Path(os.path.realpath(out))
    old = made.with_name("old")
    had_old = real.exists()
    if had_old:
        real.rename(old)
    try:
        made.rename(real)
    except BaseException:
        if had_old:
            old.rename(real)
        raise


def _remove_stale(real: Path) -> None:
    for path in real.parent.glob(f".{real.name}-*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path)


@contextlib.contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FetchError(
            f"{out} cannot be written ({reason}); name another folder with --out."
        ) from error
