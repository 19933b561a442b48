"""A kernel's source compiled for the host, and launched there."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pagedattn.attention.cuda import compiler
from pagedattn.attention.cuda.module import TENSOR_MAP_BYTES, CudaError, TensorMap

if TYPE_CHECKING:
    from collections.abc import Sequence

KERNELS = Path(compiler.__file__).parent
"""Folder of the kernels' sources."""

_FOLDER = Path(__file__).parent
_OPTIONS = (
    *("-std=c++17", "-O1", "-fPIC", "-shared"),
    *("-w", "-Wno-psabi"),  # CUDA's pragmas, and how parameters are passed
    *("-fwrapv", "-fno-strict-aliasing"),  # as NVRTC understands C++
    "-U_FORTIFY_SOURCE",  # lanes jump from stack to stack
)
_one_at_a_time = threading.Lock()


class EmulationError(RuntimeError):
    """A kernel did what the machine forbids, or cannot go on; the message says who and what."""


def unavailable() -> str | None:
    """Say in a phrase why kernels cannot be emulated here, or None if they can."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        return f"it needs Linux on x86_64 or aarch64, not {sys.platform} on {machine}"
    if _host_compiler() is None:
        return "it needs a C++ compiler: g++ or clang++"
    return None


def _host_compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


@functools.cache
def load_library(
    source: str | Path, name: str, macros: tuple[tuple[str, int | str], ...]
) -> ctypes.CDLL:
    """Compile a kernel for the host at the first call with these arguments; kept on disk.

    Args:
        source: a file of `KERNELS`, or the path of another, which may include theirs.
        name: of the kernel in it.
        macros: what it is specialised for.

    Raises:
        EmulationError: there is no compiler, or it refuses the source.

    """
    why_not, command = unavailable(), _host_compiler()
    if why_not is not None or command is None:
        raise EmulationError(f"no kernel can be emulated: {why_not}")
    file = KERNELS / source
    texts = {path.name: path.read_text(encoding="utf-8") for path in _sources(file)}
    options = (
        *_OPTIONS,
        *(f'-DSOURCE="{file.name}"', f"-DKERNEL={name}"),
        *(f"-D{key}={value}" for key, value in macros),
    )
    key = (sorted(texts.items()), options, command, platform.machine())
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    path = compiler.cache_folder() / f"emulated-{name}-{digest[:32]}.so"
    if path.exists():
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        for own, text in texts.items():
            (Path(folder) / own).write_text(text, encoding="utf-8")
        done = subprocess.run(
            [command, *options, "launch.cpp", "-o", "made.so"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise EmulationError(f"{file.name} does not compile for the host:\n{done.stderr}")
        made = Path(folder) / "made.so"
        compiler.keep(path, made.read_bytes())
        return ctypes.CDLL(str(path if path.exists() else made))


def _sources(file: Path) -> list[Path]:
    """Return the files to compile; later ones take the place of those of the same name."""
    own = sorted(path for path in _FOLDER.iterdir() if path.suffix in (".hpp", ".cuh", ".cpp"))
    return [*sorted(KERNELS.glob("*.cuh")), file, *own]


class EmulatedKernel:
    """One kernel on the host, launched as `pagedattn.attention.cuda.module.Kernel` is.

    Args:
        source: as `load_library` takes it, and so are `name` and `macros`.
        name: of the kernel.
        macros: what it is specialised for.
        seed: decides who runs when, at each launch in another way.

    """

    def __init__(
        self,
        source: str | Path,
        name: str,
        macros: Sequence[tuple[str, int | str]],
        seed: int = 0,
    ) -> None:
        self._library = load_library(source, name, tuple(macros))
        self._seeds = itertools.count(seed << 32)

    def launch(
        self,
        programs: int,
        threads: int,
        shared_bytes: int,
        parameters: ctypes.Structure,
        cluster: int = 1,
    ) -> None:
        """Run the kernel to its end.

        Args:
            programs: thread blocks.
            threads: of a program; a multiple of 32.
            shared_bytes: dynamic shared memory of a program.
            parameters: the kernel's struct; its addresses are of host memory.
            cluster: programs that reach each other's shared memory; divides `programs`.

        Raises:
            EmulationError: it does what is forbidden, or cannot go on.

        """
        error = ctypes.create_string_buffer(1024)
        with _one_at_a_time:  # the machine is one a process
            failed = self._library.launch(
                programs,
                threads,
                shared_bytes,
                cluster,
                ctypes.byref(parameters),
                ctypes.sizeof(parameters),
                ctypes.c_uint64(next(self._seeds)),
                error,
                len(error),
            )
        if failed:
            raise EmulationError(error.value.decode(errors="replace"))

    def most_clusters(self, threads: int, shared_bytes: int, cluster: int) -> int:
        """Return how many clusters run at once: all of any launch."""
        del threads, shared_bytes, cluster
        return 1 << 30


class _TensorDescription(ctypes.Structure):
    """`TensorDescription` of tma.hpp."""

    _fields_ = (
        ("memory", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 5),
        ("box", ctypes.c_uint16 * 5),
        ("swizzle", ctypes.c_uint16),
        ("dimensions", ctypes.c_uint16),
    )


def tensor_map(
    address: int,
    itemsize: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    fetched_bytes: int,
) -> TensorMap:
    """Describe a tensor in host memory; arguments as `module.tensor_map` takes them.

    Of boxes that are swizzled only those are emulated whose rows are as long as the swizzle.

    Raises:
        CudaError: the driver would refuse, or the box is not emulated. Source: CUDA driver API,
            `cuTensorMapEncodeTiled`.

    """
    right = (
        address % 16 == 0
        and all(stride % 16 == 0 and 0 <= stride < 1 << 40 for stride in strides)
        and all(0 < size <= 1 << 32 for size in sizes)
        and all(0 < size <= 256 for size in box)
        and box[0] * itemsize % 16 == 0
        and (swizzle == 16 or (swizzle in (32, 64, 128) and box[0] * itemsize == swizzle))
        and fetched_bytes in (128, 256)
    )
    if not right:
        raise CudaError(
            f"no such tensor map: {address}, {itemsize}, {sizes}, {strides}, {box}, {swizzle}"
        )
    made = _TensorDescription(memory=address, swizzle=swizzle, dimensions=len(sizes))
    made.sizes[: len(sizes)] = sizes
    made.strides[: len(sizes)] = (itemsize, *strides)
    made.box[: len(sizes)] = box
    found = TensorMap()
    assert ctypes.sizeof(made) <= TENSOR_MAP_BYTES
    ctypes.memmove(ctypes.addressof(found), ctypes.addressof(made), ctypes.sizeof(made))
    return found
