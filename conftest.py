"""Options, markers and fixtures of the whole suite."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import signal
import threading

import hypothesis
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # without a GPU, Triton kernels run on the CPU through Triton's interpreter; Triton reads
    # this when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pagedattn.attention import (  # noqa: E402
    clashes,
    get_implementation,
    implementation_names,
    register,
)
from pagedattn.benchmarking import describe_machine, machine_identity, measure_roofs  # noqa: E402
from pagedattn.benchmarking.environment import query_gpu  # noqa: E402
from pagedattn.config import ConfigError  # noqa: E402
from pagedattn.peers import FLASHINFER_KERNELS, register_kernels  # noqa: E402
from pagedattn.testing.session import (  # noqa: E402
    Findings,
    is_row,
    may_run_in_a_worker,
    room_of,
    words_for_workers,
    workers_for,
)
from pagedattn.testing.workers import run_in_workers  # noqa: E402
from pagedattn.workloads import ALL_SHAPES, shape_of_name  # noqa: E402
from pagedattn.workloads.shape_names import GRAMMAR  # noqa: E402

register_kernels()

ROOFS = pytest.StashKey()
BUILD = pytest.StashKey()
GPU_BEFORE = pytest.StashKey()

EMULATED = "cuda-emulated"
"""What --impl calls the CUDA kernels on the host, see `pagedattn.testing.emulator`."""

READY = 10.0  # seconds in which modules that are compiled already are found

hypothesis.settings.register_profile(
    "default", max_examples=300, stateful_step_count=40, deadline=None
)
hypothesis.settings.register_profile(
    "nightly", max_examples=1000, stateful_step_count=120, deadline=None
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser):
    group = parser.getgroup("pagedattn")
    group.addoption(
        "--trace-file",
        metavar="PATH",
        help="request trace (Azure CSV or Mooncake JSONL) whose lengths the benchmarks also use",
    )
    group.addoption(
        "--allow-different-machines",
        action="store_true",
        help="with --benchmark-compare: compare with a run of another machine or GPU",
    )
    group.addoption(
        "--slow-down",
        metavar="ROW",
        help="make one row of attention, such as decode-B64-4k-triton, take 5 %% longer and say so "
        "in its extra_info: a comparison with another run has to find it",
    )
    group.addoption(
        "--impl",
        metavar="NAME[,NAME...]",
        help="run on these implementations of attention alone: the whole correctness suite of "
        "attention, skipping what each says that it does not support, and every benchmark row of "
        "attention and of KV writes, beside the usual ones; with -m gpu on a GPU alone",
    )
    group.addoption(
        "--shape",
        metavar="NAME",
        action="append",
        help="time attention on a GPU on this shape, such as decode-B16-2k-h28x4, verify4-B16-2k, "
        "prefill-8x512-d64, chunk-512-over-8k-fp8 or prefill-8k-window1k-cap50, instead of the "
        "usual ones; may be repeated",
    )
    group.addoption(
        "--nightly",
        action="store_true",
        help="run the cases marked nightly too, among them every combination where else every two "
        "values meet; -m nightly runs them alone",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Find what --impl names; refuse to save benchmarks that pytest-xdist will switch off."""
    config.option.impl = _named(config.option.impl)
    config.option.shape = _shapes(config.option.shape)
    config.option.nightly |= "nightly" in re.sub(r"\bnot\s+nightly\b", "", config.option.markexpr)
    config.pluginmanager.register(Findings(), "findings")
    if threading.current_thread() is threading.main_thread():
        # who is told to end saves what was timed, as after Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if (room := room_of(config)) is not None:
        config.pluginmanager.register(room, "room")
    refuse_to_save_what_is_not_timed(config.option)


def refuse_to_save_what_is_not_timed(option):
    """Raise if pytest-xdist is asked to run tests, and pytest-benchmark to save times."""
    if not getattr(option, "numprocesses", None):
        return
    asked = [f"--benchmark-{word}" for word in ("autosave", "save", "only", "json", "compare")]
    given = [flag for flag in asked if getattr(option, flag.lstrip("-").replace("-", "_"), None)]
    if given:
        raise pytest.UsageError(
            f"{given[0]} and -n {option.numprocesses} do not go together: pytest-xdist runs "
            "tests beside each other, where nothing can be timed; leave -n away"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """On a GPU, run many cases in workers first; what is timed has the machine to itself then."""
    config = session.config
    if not GPU or session.testsfailed:
        return (yield)
    cases = [item for item in session.items if may_run_in_a_worker(item)]
    build = config.stash.get(BUILD, None)
    if workers_for(config, len(cases)) and build is not None and not build.is_ready(within=READY):
        # what is compiled is compiled once, beside the others, and for this process
        cases = [item for item in cases if _implementation(item) not in FLASHINFER_KERNELS]
    count = workers_for(config, len(cases))
    if count:
        arguments = words_for_workers(config.option)
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(
                f"{len(cases):,} cases run in {count} workers, beside one another; "
                "with -n 0 they run in this process"
            )
        whole_engines = [item for item in cases if _turn(item) == 0]
        run_in_workers(session, cases, count, arguments, whole_engines)
    return (yield)


def _needs_the_gpu_alone(item):
    return item.get_closest_marker("gpu") and item.get_closest_marker("undisturbed")


def _named(given):
    """Names that --impl gives, each of an implementation that can be imported; None without."""
    if given is None:
        return None
    names = list(dict.fromkeys(filter(None, (name.strip() for name in given.split(",")))))
    if not names:
        raise pytest.UsageError("--impl names no implementation")
    for name in names:
        try:
            _make_known(name)
            get_implementation(name)
        except (ImportError, ValueError) as error:
            raise pytest.UsageError(f"--impl: {error}") from None
    return names


def _shapes(given):
    """Names that --shape gives, each of a shape, once; empty without."""
    names = list(dict.fromkeys(given or ()))
    for name in names:
        try:
            if name not in {shape.name for shape in ALL_SHAPES} and shape_of_name(name) is None:
                raise pytest.UsageError(f"--shape {name} is neither a row's nor like {GRAMMAR}")
        except ConfigError as error:
            raise pytest.UsageError(f"--shape {name}: {error}") from None
    return names


def _make_known(name):
    """Register the emulated kernels at the first use of their name; all others are known."""
    if name == EMULATED and name not in implementation_names():
        emulator = importlib.import_module("pagedattn.testing.emulator")  # it needs Triton
        register(emulator.EmulatedImplementation())


def pytest_report_header(config):
    told = [f"pagedattn.attention: {sentence}" for sentence in clashes()]
    if config.option.impl is not None:
        told.append(f"implementations: {', '.join(config.option.impl)}")
    if not config.option.nightly:
        told.append("without what is marked nightly: --nightly runs it too")
    return told


def pytest_terminal_summary(terminalreporter, config):
    if build := config.stash.get(BUILD, None):
        terminalreporter.write_line(f"compiled of FlashInfer: {build.report}")
    passed = terminalreporter.getreports("passed")
    if config.getoption("numprocesses", None) and any("::bench_" in each.nodeid for each in passed):
        terminalreporter.write_line(
            "benchmarks ran once each and were not timed: -n runs tests beside each other"
        )


def pytest_pycollect_makeitem(collector, obj):
    """Make no items of a function marked nightly in other runs: it can have thousands."""
    if collector.config.option.nightly:
        return None
    marks = getattr(obj, "pytestmark", ())
    is_nightly = isinstance(marks, list) and any(mark.name == "nightly" for mark in marks)
    return [] if is_nightly and not inspect.ismodule(obj) else None


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not GPU:
        reasons["gpu"] = "needs a CUDA GPU, and torch sees none"
    if importlib.util.find_spec("vllm") is None:
        reasons["vllm"] = "needs vLLM, which is not installed"
    if not (importlib.util.find_spec("selenium") and shutil.which("chromedriver")):
        reasons["browser"] = "needs selenium, Chromium and its chromedriver"
    if not config.option.nightly:
        _keep(config, items, lambda item: not item.get_closest_marker("nightly"))
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):  # keywords hold folders' names too
                item.add_marker(pytest.mark.skip(reason=reason))
        if GPU and hasattr(config, "workerinput") and _needs_the_gpu_alone(item):
            item.add_marker(pytest.mark.skip(reason="measures time; other workers hold the GPU"))
    if config.option.impl is not None:
        _keep(config, items, _runs_on_an_implementation)
    if not hasattr(config, "workerinput"):  # workers take cases in the order they are told
        items.sort(key=_turn)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After a failure that the GPU does not recover from, end the session with a sentence."""
    report = yield
    if GPU and call.excinfo is not None and call.excinfo.errisinstance(RuntimeError):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            item.session.shouldfail = (
                f"the GPU takes no more work from this process since {item.nodeid}, or what was "
                f"launched shortly before: {reason}; what was timed before is saved"
            )
    return report


def _implementation(item):
    return getattr(getattr(item, "callspec", None), "params", {}).get("implementation")


def _turn(item):
    """Place a case among the session's: the longest first, then what is quick, then what is timed.

    A wrong kernel is told before any is timed, and what a session compiles is ready by then.
    """
    if is_row(item):
        return 3  # all implementations of a row are timed together, so they are not taken apart
    if _implementation(item) is not None:
        return 2 if _implementation(item) in FLASHINFER_KERNELS else 1
    return 0 if item.get_closest_marker("vllm") else 1  # a whole engine starts


def pytest_collection_finish(session):
    """Begin to compile what the session's tests need of FlashInfer, beside the first tests."""
    if (
        not GPU
        or importlib.util.find_spec("flashinfer") is None
        or session.config.option.collectonly
    ):
        return
    from pagedattn.peers.flashinfer import Build, needs
    from pagedattn.testing.support import BLOCK_SIZES, HEAD_SIZES
    from pagedattn.workloads import find_shape

    specs = set()
    for item in session.items:
        name = _implementation(item)
        if name == "flashinfer":
            specs |= needs.of_kv_writes()
        if name not in FLASHINFER_KERNELS:
            continue
        if is_row(item):
            specs |= needs.of_benchmarks(name, [find_shape(item.callspec.params["case"])])
        else:
            specs |= needs.of_correctness(name, HEAD_SIZES, BLOCK_SIZES)
    session.config.stash[BUILD] = Build(sorted(specs, key=repr)).start()


def _runs_on_an_implementation(item):
    return _implementation(item) is not None and item.path.parent.name == "attention"


def _keep(config, items, is_kept):
    dropped = [item for item in items if not is_kept(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if is_kept(item)]


@pytest.fixture(scope="session")
def roofs(request):
    """Measured limits of the GPU; kept for the results file."""
    request.config.stash[GPU_BEFORE] = query_gpu()
    measured = measure_roofs()
    request.config.stash[ROOFS] = measured
    return measured


@pytest.fixture(scope="session")
def named(request):
    """Implementations that --impl names, or None."""
    return request.config.option.impl


@pytest.fixture(scope="session")
def flashinfer_modules(request):
    """Wait until all that the session needs of FlashInfer is compiled."""
    build = request.config.stash.get(BUILD, None)
    if build is not None:
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        build.wait(None if reporter is None else reporter.write_line)


@pytest.fixture
def keep_finding(request):
    """Function that keeps what an implementation was found to support for the results file."""
    return lambda found: request.node.user_properties.append(("finding", dataclasses.asdict(found)))


@pytest.fixture(scope="session")
def clock_probe():
    """Function that measures the GPU's clock in Hz."""
    from pagedattn.benchmarking.clock_probe import ClockProbe

    return ClockProbe()


@pytest.fixture(scope="session")
def trace_path(request):
    """Path given with --trace-file, or None."""
    return request.config.getoption("--trace-file")


def pytest_benchmark_update_machine_info(config, machine_info):
    # a host's name and kernel build say nothing about its speed
    machine_info.pop("node", None)
    machine_info.pop("release", None)
    machine_info.get("cpu", {}).pop("flags", None)
    described = describe_machine()
    described["gpu_before"] = config.stash.get(GPU_BEFORE, None)
    measured = config.stash.get(ROOFS, None)
    described["measured"] = {
        "read_gb_per_s": measured and measured.read_gb_per_s,
        "copy_gb_per_s": measured and measured.copy_gb_per_s,
        "matmul_tflop_per_s": measured and measured.matmul_tflop_per_s,
    }
    machine_info["pagedattn"] = described


def pytest_benchmark_update_json(config, output_json):
    found = config.pluginmanager.get_plugin("findings").found
    if found:
        output_json["support"] = found


def pytest_benchmark_update_commit_info(commit_info):
    # the folder's name on somebody's disk says nothing about the commit
    commit_info["project"] = "pagedattn"


def pytest_benchmark_compare_machine_info(config, machine_info, compared_benchmark):
    if config.getoption("--allow-different-machines"):
        return
    ours = machine_identity(machine_info)
    theirs = machine_identity(compared_benchmark["machine_info"])
    if ours != theirs:
        raise pytest.UsageError(
            f"this machine is {ours}, the saved run was made on {theirs}: "
            "timings of two machines cannot be compared (--allow-different-machines does it)"
        )
