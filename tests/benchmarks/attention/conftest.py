"""What rows of attention share: who takes part in a case, back ends, a slow-down on purpose.

A row that takes `implementation` runs on those of `@pytest.mark.implementations(...)`, and before
them on those that `--impl` names.
"""

import gc
import statistics
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pagedattn.benchmarking import LaunchGraph

SLOWER = 0.05


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("--slow-down")
    rows = [item.callspec.id for item in items if "slowed" in item.fixturenames]
    if asked is not None and rows and asked not in rows:
        raise pytest.UsageError(f"--slow-down {asked} is no row of attention, as {rows[0]} is")


@pytest.hookimpl(trylast=True)  # the case comes first in a row's name
def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("implementations")
    if "implementation" in metafunc.fixturenames and marker is not None:
        usual = marker.args
        named = metafunc.config.option.impl or ()
        metafunc.parametrize("implementation", list(dict.fromkeys([*named, *usual])))


@pytest.fixture(autouse=True)
def all_backends_of_torch():
    """PyTorch chooses among all of its backends, whatever a peer has switched off by its import."""
    backends = (
        *(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
        *(SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH),
    )
    with sdpa_kernel(list(backends)):
        yield


@pytest.fixture(scope="module")
def give_back():
    """Function that gives back memory of the GPU, also what only a cycle holds.

    To look for cycles among all that a session's cases and imports are takes half a second. What
    the first case leaves is therefore not looked through again before the module's end.
    """

    def collect():
        gc.collect()
        if not gc.get_freeze_count():
            gc.freeze()
        torch.cuda.empty_cache()

    yield collect
    gc.unfreeze()


@pytest.fixture(scope="module")
def selected(request):
    """Function of one parameter: which implementations of a case will run in this session."""

    def names(parameter, value):
        return [
            item.callspec.params["implementation"]
            for item in request.session.items
            if item.path == request.path
            and item.callspec.params[parameter] == value
            and not item.get_closest_marker("skip")
        ]

    return names


@pytest.fixture(scope="module")
def slowed(request):
    """Function of a row's name and launches: what is timed, slower for the row of --slow-down."""

    def launches_of(row, launches):
        if row != request.config.getoption("--slow-down"):
            return launches
        if torch.cuda.is_available():
            return slower_on_gpu(launches, request.getfixturevalue("clock_probe"))
        return [slower_on_host(launch) for launch in launches]

    return launches_of


@pytest.fixture(autouse=True)
def say_that_it_is_slowed(request):
    """Write into a row that it was slowed on purpose, and by what share."""
    callspec = getattr(request.node, "callspec", None)
    asked = request.config.getoption("--slow-down")
    if asked is not None and callspec is not None and callspec.id == asked:
        request.getfixturevalue("benchmark").extra_info["slowed_by"] = SLOWER


def slower_on_host(launch):
    """The launch, and after it as much waiting as makes it 5 % longer."""

    def slower():
        begin = time.perf_counter()
        result = launch()
        end = begin + (time.perf_counter() - begin) * (1 + SLOWER)
        while time.perf_counter() < end:
            pass
        return result

    return slower


def slower_on_gpu(launches, clock_probe):
    """The launches, each with a spin behind it that makes it 5 % longer, its own launch included.

    Raises:
        ValueError: a launch is so short that another one behind it alone is more than 5 %.

    """

    def with_spin(cycles):
        def both(launch):
            launch()
            torch.cuda._sleep(cycles)

        return [lambda launch=launch: both(launch) for launch in launches]

    def median(works):
        graph = LaunchGraph(works)
        return statistics.median(graph.replay() for _ in range(20))

    usual = median(launches)
    wanted = SLOWER * usual - (median(with_spin(1)) - usual)
    if wanted <= 0:
        raise ValueError(f"a launch of {usual * 1e6:.1f} µs is too short to be made 5 % longer")
    return with_spin(round(wanted * clock_probe()))
