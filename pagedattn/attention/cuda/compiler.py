"""CUDA C++ to machine code with NVRTC, which comes with PyTorch; kept on disk between processes.

Sources lie beside this module. They include each other and nothing else, so no CUDA toolkit is
needed. What a kernel is specialised for is given as macros.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHITECTURE = "sm_90a"
"""Hopper, with its own instructions (`wgmma`, `setmaxnreg`)."""

_FOLDER = Path(__file__).parent
_HEADERS = tuple(sorted(path.name for path in _FOLDER.glob("*.cuh")))


class CompileError(RuntimeError):
    """A source was refused by the compiler; the message holds its log."""


def cache_folder() -> Path:
    """Folder of compiled kernels: `PAGEDATTN_CACHE`, or `pagedattn` in the user's cache folder."""
    given = os.environ.get("PAGEDATTN_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pagedattn"


def compile_kernel(source: str, macros: Mapping[str, int | str]) -> bytes:
    """Compile a source file of this package for Hopper, or read what was compiled before.

    The cache's key is a digest of the sources, the macros and the compiler's version. A folder
    that cannot be written costs the next process the time to compile, and nothing else.

    Args:
        source: name of a file beside this module, such as ``"decode.cu"``.
        macros: names and values defined while compiling.

    Returns:
        A cubin.

    Raises:
        CompileError: NVRTC refuses the source.
        ImportError: `cuda.bindings` or NVRTC is missing.

    """
    texts = _texts(source)
    options = (
        f"--gpu-architecture={ARCHITECTURE}",
        "--std=c++17",
        "--use_fast_math",
        *(f"-D{name}={value}" for name, value in sorted(macros.items())),
    )
    digest = hashlib.sha256(repr((texts, options, compiler_version())).encode()).hexdigest()
    path = cache_folder() / f"{Path(source).stem}-{digest[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    cubin = _compile(source, texts, options)
    keep(path, cubin)
    return cubin


def compiler_version() -> tuple[int, int]:
    """Return NVRTC's version.

    Raises:
        ImportError: `cuda.bindings` is missing.
        RuntimeError: NVRTC's library cannot be loaded.

    """
    # here: NVRTC is large, and only a GPU needs it
    from cuda.bindings import nvrtc

    major, minor = _checked(nvrtc.nvrtcVersion())
    return major, minor


@functools.cache
def _texts(source: str) -> tuple[str, ...]:
    return tuple((_FOLDER / name).read_text(encoding="utf-8") for name in (source, *_HEADERS))


def _compile(source: str, texts: tuple[str, ...], options: tuple[str, ...]) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(
        nvrtc.nvrtcCreateProgram(
            texts[0].encode(),
            source.encode(),
            len(_HEADERS),
            [text.encode() for text in texts[1:]],
            [name.encode() for name in _HEADERS],
        )
    )
    try:
        encoded = [option.encode() for option in options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompileError(f"{source} does not compile:\n{log.decode(errors='replace')}")
        cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))  # fills it
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(answer: tuple[Any, ...]) -> Any:
    from cuda.bindings import nvrtc

    if answer[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC answers {answer[0].name}")
    return answer[1] if len(answer) == 2 else answer[1:]


def keep(path: Path, compiled: bytes) -> None:
    """Write a file whole or not at all: processes may compile the same kernel at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(compiled)
        Path(file.name).replace(path)
    except OSError:
        return
