"""FlashInfer compiles a module for each dtype, head size and feature: all of them at once here.

Compiling takes a quarter of a minute to minutes each, on first use, one after the other. Known
beforehand, they are compiled side by side, by one ninja over all cores, and without the kernels
for ragged keys and for custom masks, which nothing here launches and which are most of the work.
What does not compile is remembered, so that nobody waits for it to fail again.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

TELL_EVERY = 15.0  # seconds
_STATUS = re.compile(r"\[(\d+)/(\d+)\]")  # ninja's, before each step
_failures: dict[Spec, str] = {}
_LEFT_OUT = re.compile(r"_ragged_|_mask_[23]\.cu$")  # masks 2 and 3 are a custom and a scoring one


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
        self._seconds = 0.0
        self._progress = "nothing is compiled yet"
        self._thread = threading.Thread(target=self._run, name="flashinfer-build", daemon=True)

    def start(self) -> Build:
        """Import what describes the modules, and begin; returns before any is compiled.

        The import is not left to the thread: which warnings are errors holds for the whole process,
        and tests that begin and end meanwhile would undo what FlashInfer's dependencies set.
        """
        try:
            for module in sorted({spec.module for spec in self._specs}):
                importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - told to whoever waits
            self._error = error
        self._thread.start()
        return self

    def wait(self, tell: Callable[[str], object] | None = None) -> None:
        """Return when all are compiled or have failed.

        Args:
            tell: called with a sentence about how far it is, every quarter of a minute.

        Raises:
            Exception: what kept FlashInfer from being imported, or the compiler from running.

        """
        self._thread.join(0 if tell is None else TELL_EVERY)
        while self._thread.is_alive():
            if tell is not None:
                tell(f"waiting for FlashInfer to be compiled: {self._progress}")
            self._thread.join(TELL_EVERY)
        if self._error is not None:
            raise self._error

    def is_ready(self, within: float) -> bool:
        """Whether all can be loaded by any process, looked at for a time at most.

        Args:
            within: seconds.

        """
        self._thread.join(within)
        done = not self._thread.is_alive() and self._error is None
        return done and not any(failed(spec) for spec in self._specs)

    def _run(self) -> None:
        if self._error is not None or not self._specs:
            return
        begin = time.perf_counter()
        try:
            compile_all(self._specs, self._jobs, self._note)
        except Exception as error:  # noqa: BLE001 - told to whoever waits
            self._error = error
        self._seconds = time.perf_counter() - begin

    def _note(self, line: str) -> None:
        if found := _STATUS.match(line):
            self._progress = "{} of {} steps are done".format(*found.groups())

    @property
    def report(self) -> str:
        """What it did: how many modules, how long it took, and which failed."""
        failures = [f"{spec.function}: {why}" for spec in self._specs if (why := failed(spec))]
        done = len(self._specs) - len(failures)
        return "; ".join([f"{done} modules in {self._seconds:.0f} s", *failures])


def compile_all(
    specs: Iterable[Spec], jobs: int, note: Callable[[str], object] = lambda _: None
) -> None:
    """Compile modules side by side; those that fail are told by `failed` from then on.

    `note` gets each line that ninja prints, as it prints it.

    From then on FlashInfer loads what is compiled without looking at the sources again: it would
    compile the kernels that were left out. That holds for this process.
    """
    core: Any = importlib.import_module("flashinfer.jit.core")
    environment: Any = importlib.import_module("flashinfer.jit.env")
    wanted: dict[Spec, Any] = {}
    for spec in specs:
        try:
            made = spec.make()
        except (AssertionError, ValueError, NotImplementedError) as error:
            _failures[spec] = f"FlashInfer does not make it: {str(error).splitlines()[0]}"
            continue
        if not made.is_compiled:
            wanted[spec] = _without_the_unused(made)
            wanted[spec].write_ninja()
    if not environment.FLASHINFER_AOT_DIR.exists():
        environment.FLASHINFER_AOT_DIR = environment.FLASHINFER_JIT_DIR
    if not wanted:
        return
    folder: Path = environment.FLASHINFER_JIT_DIR
    top = folder / f"pagedattn-{os.getpid()}.ninja"
    lines = [f"subninja {made.ninja_path}" for made in wanted.values()]
    core.write_if_different(top, "\n".join(["ninja_required_version = 1.3", *lines, ""]))
    # -k 0: one that does not compile stops no other
    words = [_ninja(), "-k", "0", "-j", str(jobs), "-C", str(folder), "-f", str(top)]
    printed = []
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as compiling:
        assert compiling.stdout is not None
        for line in compiling.stdout:
            printed.append(line)
            note(line)
    top.unlink()
    output = "".join(printed)
    for spec, made in wanted.items():
        if not made.is_compiled:
            _failures[spec] = f"FlashInfer does not compile it: {_reason(output, made.name)}"


def _without_the_unused(made: Any) -> Any:
    sources = [source for source in made.sources if not _LEFT_OUT.search(source.name)]
    # what is left out is looked for when it is called, not when the module is loaded
    return replace(
        made, sources=sources, extra_ldflags=[*(made.extra_ldflags or []), "-Wl,-z,lazy"]
    )


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
