"""Options, markers and fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import os
import shutil

import hypothesis
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # without a GPU, Triton kernels run on the CPU through Triton's interpreter; Triton reads
    # this when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pagedattn.benchmarking import describe_machine, machine_identity, measure_roofs  # noqa: E402
from pagedattn.benchmarking.environment import query_gpu  # noqa: E402

ROOFS = pytest.StashKey()
GPU_BEFORE = pytest.StashKey()

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
    group.addoption("--nightly", action="store_true", help="run the cases marked nightly too")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Refuse to save benchmarks that pytest-xdist will have switched off."""
    if not getattr(config.option, "numprocesses", None):
        return
    asked = [f"--benchmark-{word}" for word in ("autosave", "save", "only", "json", "compare")]
    given = [flag for flag in asked if config.getoption(flag.lstrip("-").replace("-", "_"), None)]
    if given:
        raise pytest.UsageError(
            f"{given[0]} and -n {config.option.numprocesses} do not go together: pytest-xdist runs "
            "tests beside each other, where nothing can be timed; leave -n away"
        )


def pytest_terminal_summary(terminalreporter, config):
    if getattr(config.option, "numprocesses", None):
        terminalreporter.write_line(
            "benchmarks ran once each and were not timed: pytest-xdist (-n) runs tests beside "
            "each other"
        )


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not GPU:
        reasons["gpu"] = "needs a CUDA GPU, and torch sees none"
    if importlib.util.find_spec("vllm") is None:
        reasons["vllm"] = "needs vLLM, which is not installed"
    if not (importlib.util.find_spec("selenium") and shutil.which("chromedriver")):
        reasons["browser"] = "needs selenium, Chromium and its chromedriver"
    if not config.getoption("--nightly"):
        reasons["nightly"] = "slow; runs with --nightly"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):  # keywords hold folders' names too
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def roofs(request):
    """Measured limits of the GPU; kept for the results file."""
    request.config.stash[GPU_BEFORE] = query_gpu()
    measured = measure_roofs()
    request.config.stash[ROOFS] = measured
    return measured


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
