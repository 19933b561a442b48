"""Read pytest-benchmark's results files, check them, and join several into one run."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedattn.report.columns import DEFINITIONS
from pagedattn.report.data import to_frame
from pagedattn.report.rows import Row, parse_row
from pagedattn.report.support import Support, parse_support
from pagedattn.report.text import clean, cut, number
from pagedattn.report.values import (
    LARGEST,
    ResultsError,
    count_of,
    expect_number,
    expect_object,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    import pandas as pd

COLUMNS: tuple[str, ...] = tuple(DEFINITIONS)
"""The table's columns, in order; `columns.DEFINITIONS` says what each is."""

LARGEST_FILE = 256 << 20
"""Bytes of the largest results file that is read: more is no run of benchmarks."""


@dataclass(frozen=True, slots=True)
class ResultsFile:
    """One results file: its rows, the names of those not ours, and what it says of the machine.

    `machine` is what tells machines apart; `about` is (label, text) pairs for a reader. `load` is
    how many processes wanted to run when it ended and `num_cores` on how many cores, or None.
    `support` is what implementations were found to support.
    """

    path: Path
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    machine: tuple[tuple[str, str], ...]
    about: tuple[tuple[str, str], ...]
    load: float | None = None
    num_cores: int | None = None
    support: tuple[Support, ...] = ()

    @property
    def num_skipped(self) -> int:
        """How many benchmarks have no area, implementation or workload."""
        return len(self.skipped)

    @property
    def name(self) -> str:
        """The file's path below the current directory, or its last part outside of it."""
        path = self.path.resolve()
        here = Path.cwd()
        return clean(path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name)


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one or more files, sorted; `num_replaced` rows gave way to a later file's."""

    files: tuple[ResultsFile, ...]
    rows: tuple[Row, ...]
    num_replaced: int

    @property
    def num_skipped(self) -> int:
        """How many benchmarks of all files have no area, implementation or workload."""
        return sum(file.num_skipped for file in self.files)


def load(paths: str | PathLike[str] | Iterable[str | PathLike[str]]) -> pd.DataFrame:
    """Read results files into a tidy table with one row per case and implementation.

    `paths` are one or more JSON files of pytest-benchmark, with or without raw samples. A later
    file's row replaces an earlier one's of the same ``fullname``. Files of different machines are
    joined with a UserWarning. Raises ResultsError if a file is missing, unreadable, broken or not
    pytest-benchmark's, or if no row is ours.

    The columns are those of `COLUMNS`, in that order; `pagedattn.report.DEFINITIONS` and
    docs/DATA.md have the type, the unit and the meaning of each. What a benchmark does not say is
    missing: ``pd.NA`` in text and counts, NaN in numbers, which no file may hold itself.
    """
    if isinstance(paths, str) or not hasattr(paths, "__iter__"):
        paths = [paths]
    run = load_run([Path(path) for path in paths])
    if (other := _of_another_machine(run)) is not None:
        warnings.warn(
            f"{_apart(run.files[0], other)}: times of different machines do not compare.",
            stacklevel=2,
        )
    return to_frame(run.rows)


def load_run(paths: list[Path]) -> Run:
    """Read and join files; raise ResultsError as `load` does.

    The n-th row of a name in a later file replaces the n-th of that name in an earlier one.
    """
    if not paths:
        raise ResultsError("There is no results file to read: give at least one.")
    files = tuple(read_file(path) for path in paths)
    rows: dict[object, Row] = {}
    num_rows = 0
    for place, file in enumerate(files):
        copies: Counter[str] = Counter()
        for i, row in enumerate(file.rows):
            # rows of one file never replace each other, whatever their names
            copies[row.fullname] += 1
            rows[(row.fullname, copies[row.fullname]) if row.fullname else (place, i)] = row
            num_rows += 1
    if not rows:
        names = ", ".join(_quoted(path) for path in paths)
        count = sum(file.num_skipped for file in files)
        lacks = f"None of the {count} benchmarks in {names} has"
        if count == 1:
            lacks = f"The only benchmark in {names} does not have"
        raise ResultsError(
            f"{lacks} the extra_info of this suite: area, implementation and workload."
        )
    ordered = tuple(sorted(rows.values(), key=lambda row: row.sort_key))
    return Run(files, ordered, num_rows - len(rows))


def require_one_machine(run: Run) -> None:
    """Raise ResultsError if the run's files come from different machines."""
    if (other := _of_another_machine(run)) is not None:
        raise ResultsError(
            f"{_apart(run.files[0], other)}: give --allow-different-machines to join them anyway."
        )


def _of_another_machine(run: Run) -> ResultsFile | None:
    first, *others = run.files
    return next((file for file in others if file.machine != first.machine), None)


def _apart(first: ResultsFile, other: ResultsFile) -> str:
    return (
        f"{_quoted(first.path)} and {_quoted(other.path)} come from different machines "
        f"({_named(first)}; {_named(other)})"
    )


def newest_file(folder: Path) -> Path | None:
    """Return the newest run in pytest-benchmark's storage `folder`, or None if it holds none.

    The newest has the latest modification time, then the last name.
    """
    saved = [path for path in folder.glob("*/[0-9][0-9][0-9][0-9]_*.json") if path.is_file()]
    return max(saved, key=lambda path: (path.stat().st_mtime_ns, path.name, path), default=None)


def read_file(path: Path) -> ResultsFile:
    """Read and check one file; raise ResultsError with a sentence that names it."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except IsADirectoryError:
        raise ResultsError(f"{_quoted(path)} is a folder, not a results file.") from None
    except FileNotFoundError:
        raise ResultsError(f"{_quoted(path)} does not exist.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ResultsError(f"{_quoted(path)} cannot be read: {reason}.") from None
    if len(text) > LARGEST_FILE:
        raise ResultsError(
            f"{_quoted(path)} has more than {LARGEST_FILE >> 20} MiB, which no results file needs."
        )
    if not text.strip():
        raise ResultsError(f"{_quoted(path)} is empty.")
    try:
        content = json.loads(
            text, parse_constant=_refuse_constant, object_pairs_hook=_without_twins
        )
    except RecursionError:
        raise ResultsError(f"{_quoted(path)} is nested too deeply.") from None
    except ValueError as error:
        reason = cut(str(error), 120)
        raise ResultsError(f"{_quoted(path)} is not valid JSON: {reason}.") from None
    try:
        return _parse(path, content)
    except ResultsError as error:
        raise ResultsError(f"{_quoted(path)}: {error}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"an object has the key {cut(twin, 60)!r} twice")
    return made


def _parse(path: Path, content: Any) -> ResultsFile:
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ResultsError("this is not a results file of pytest-benchmark.")
    if not content["benchmarks"]:
        raise ResultsError("the file holds no benchmarks.")
    info = expect_object(content.get("machine_info"), "machine_info")
    own = expect_object(info.get("pagedattn") or {}, "machine_info.pagedattn")
    gpu = expect_object(own.get("gpu") or {}, "machine_info.pagedattn.gpu")
    measured = expect_object(own.get("measured") or {}, "machine_info.pagedattn.measured")
    roofs = {}
    if measured.get("read_gb_per_s") is not None:
        value = expect_number(measured["read_gb_per_s"], "measured.read_gb_per_s")
        roofs = {"cuda" if gpu else "cpu": value}
    rows = [parse_row(benchmark, clean(path.name), roofs) for benchmark in content["benchmarks"]]
    kept = tuple(row for row in rows if row is not None)
    skipped = tuple(
        clean(str(benchmark.get("fullname") or "a benchmark without a name"))
        for benchmark, row in zip(content["benchmarks"], rows, strict=True)
        if row is None
    )
    machine = _machine(info, own)
    place = "machine_info.pagedattn"
    num_cores = count_of(own.get("num_cpus"), f"{place}.num_cpus")
    load = expect_object(own.get("cpu") or {}, f"{place}.cpu").get("load_1min")
    if load is not None:
        load = expect_number(load, f"{place}.cpu.load_1min")
    about = tuple(_about(content, info, own, gpu, measured))
    return ResultsFile(
        *(path, kept, skipped, machine, about),
        load=load,
        num_cores=num_cores,
        support=parse_support(content.get("support") or [], "cuda" if gpu else "cpu"),
    )


def _machine(info: dict[str, Any], own: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    if own.get("machine") is not None:
        machine = expect_object(own["machine"], "machine_info.pagedattn.machine")
    else:
        cpu = info.get("cpu")
        brand = cpu.get("brand_raw") if isinstance(cpu, dict) else None
        machine = {"cpu": brand, "node": info.get("node")}
    return tuple(sorted((clean(str(key)), clean(str(value))) for key, value in machine.items()))


def _about(
    content: dict[str, Any],
    info: dict[str, Any],
    own: dict[str, Any],
    gpu: dict[str, Any],
    measured: dict[str, Any],
) -> list[tuple[str, str]]:
    """Make the lines of a report's table about the machine, of what the file says of it."""
    versions = expect_object(own.get("versions") or {}, "machine_info.pagedattn.versions")
    commit = content.get("commit_info")
    commit = commit if isinstance(commit, dict) else {}
    cpu = expect_object(own.get("cpu") or {}, "machine_info.pagedattn.cpu")
    changed = " with uncommitted changes" if commit.get("dirty") is True else ""
    python = versions.get("python") or info.get("python_version")
    lines: list[tuple[str, object, str]] = [
        ("GPU", gpu.get("name"), ""),
        ("GPU memory", _gib(gpu.get("memory_bytes")), " GiB"),
        ("multiprocessors", gpu.get("num_sms"), ""),
        ("L2 cache", _gib(gpu.get("l2_bytes"), 1 << 20), " MiB"),
        ("driver", gpu.get("driver"), ""),
        ("CUDA", gpu.get("cuda"), ""),
        ("SM clock", gpu.get("sm_clock_mhz"), " MHz"),
        ("highest SM clock", gpu.get("sm_clock_max_mhz"), " MHz"),
        ("memory clock", gpu.get("memory_clock_mhz"), " MHz"),
        ("power limit", gpu.get("power_limit_w"), " W"),
        ("temperature", gpu.get("temperature_c"), " °C"),
        ("ECC", gpu.get("ecc"), ""),
        ("MIG", gpu.get("mig"), ""),
        ("clocks held back by", gpu.get("clocks_held_back"), ""),
        ("measured read bandwidth", measured.get("read_gb_per_s"), " GB/s"),
        ("measured copy bandwidth", measured.get("copy_gb_per_s"), " GB/s"),
        ("CPU", dict(_machine(info, own)).get("cpu"), ""),
        ("CPU cores", own.get("num_cpus"), ""),
        ("PyTorch's CPU threads", own.get("num_threads"), ""),
        ("CPU governor", cpu.get("governor"), ""),
        ("CPU clock", cpu.get("mhz"), " MHz"),
        ("load when it ended", cpu.get("load_1min"), ""),
        ("Python", python, ""),
        *((str(name), version, "") for name, version in versions.items() if name != "python"),
        ("commit", commit.get("id"), changed),
        ("measured at", content.get("datetime"), ""),
    ]
    return [
        (clean(label), _told(clean(label), value) + unit)
        for label, value, unit in lines
        if isinstance(value, str | int | float) and value not in ("", "None")
    ]


def _told(label: str, value: str | float) -> str:
    if not isinstance(value, str | bool):
        expect_number(value, f"machine_info: {label}", least=-LARGEST)
    return number(value) if isinstance(value, float) else cut(str(value), 80)


def _gib(value: Any, unit: int = 1 << 30) -> float | None:
    return None if value is None else expect_number(value, "a size in bytes") / unit


def _named(file: ResultsFile) -> str:
    known = dict(file.machine)
    gpu = known.get("gpu", "None")
    mark = known.get("gpu_uuid_sha256", "None")
    if "None" not in (gpu, mark):  # two GPUs of one kind have one name
        gpu = f"{gpu} {mark[:8]}"
    names = [known.get("cpu", "an unnamed CPU"), "no GPU" if gpu == "None" else gpu]
    return " with ".join(names)


def _quoted(path: Path) -> str:
    return clean(str(path)) or "''"
