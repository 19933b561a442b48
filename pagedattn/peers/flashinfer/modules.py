"""FlashInfer compiles a module for each dtype, head size and feature: all of them at once here.

Compiling takes a quarter of a minute to minutes each, on first use, one after the other. Known
beforehand, they are compiled side by side, by one ninja over all cores. What does not compile is
remembered, so that nobody waits for it to fail again.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_failures: dict[Spec, str] = {}


@dataclass(frozen=True)
class Spec:
    """A module that FlashInfer can compile.

    Attributes:
        module: of FlashInfer, where `function` is.
        function: makes FlashInfer's own description of the module.
        arguments: of the function, hashable.

    """

    module: str
    function: str
    arguments: tuple[Any, ...]

    def make(self) -> Any:
        """Make FlashInfer's description, a `JitSpec`; writes its sources."""
        return getattr(importlib.import_module(self.module), self.function)(*self.arguments)


class Build:
    """Modules being compiled in the background, all at once.

    Args:
        specs: which; those that are compiled already cost nothing.
        jobs: compilers at a time; None is one for each processor.

    """

    def __init__(self, specs: Iterable[Spec], jobs: int | None = None) -> None:
        self._specs = list(dict.fromkeys(specs))
        self._jobs = jobs or os.cpu_count() or 1
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="flashinfer-build", daemon=True)

    def start(self) -> Build:
        """Begin; returns at once."""
        self._thread.start()
        return self

    def wait(self) -> None:
        """Return when all are compiled or have failed.

        Raises:
            Exception: what kept the compiler from running at all.

        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            compile_all(self._specs, self._jobs)
        except Exception as error:  # told to whoever waits
            self._error = error


def compile_all(specs: Iterable[Spec], jobs: int) -> None:
    """Compile modules side by side; those that fail are told by `failed` from then on."""
    core = importlib.import_module("flashinfer.jit.core")
    environment = importlib.import_module("flashinfer.jit.env")
    wanted: dict[Spec, Any] = {}
    for spec in specs:
        try:
            made = spec.make()
        except (AssertionError, ValueError, NotImplementedError) as error:
            _failures[spec] = f"FlashInfer does not make it: {str(error).splitlines()[0]}"
            continue
        if not made.is_compiled:
            made.write_ninja()
            wanted[spec] = made
    if not wanted:
        return
    folder: Path = environment.FLASHINFER_JIT_DIR
    top = folder / f"pagedattn-{os.getpid()}.ninja"
    lines = [f"subninja {made.ninja_path}" for made in wanted.values()]
    core.write_if_different(top, "\n".join(["ninja_required_version = 1.3", *lines, ""]))
    # -k 0: one that does not compile stops no other
    done = subprocess.run(
        [_ninja(), "-k", "0", "-j", str(jobs), "-C", str(folder), "-f", str(top)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    top.unlink()
    for spec, made in wanted.items():
        if not made.is_compiled:
            _failures[spec] = f"FlashInfer does not compile it: {_reason(done.stdout, made.name)}"


def failed(spec: Spec) -> str | None:
    """Say why a module could not be compiled, in a phrase; None if nothing is known against it."""
    return _failures.get(spec)


def _ninja() -> str:
    found = shutil.which("ninja")
    if found is None:
        raise FileNotFoundError("FlashInfer compiles with ninja, which is not installed")
    return found


def _reason(output: str, name: str) -> str:
    """Take the first error of a module's compilation from what ninja printed."""
    _, _, own = output.partition(f"{name}/")
    lines = [line.strip() for line in own.splitlines() if "error" in line.lower()]
    return (lines[0] if lines else "no error was printed")[:160]
