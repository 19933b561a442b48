"""What the rows that compare block managers share."""

import gc

import pytest

from pagedattn.benchmarking import DeviceClock, time_by_turns
from pagedattn.peers import PagedattnBlockManager, VllmBlockManager

CLOCK = DeviceClock()
OWN = "implementation"
ROUNDS = 30
WARMUP = 3


def pytest_collection_modifyitems(items):
    for item in items:
        if "play" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def without_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def make_manager():
    """Make an implementation's manager of so many usable blocks."""

    def make(implementation, num_blocks, block_size, *, prefix_caching=True):
        if implementation == "vllm":
            return VllmBlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
        return PagedattnBlockManager(
            num_blocks,
            block_size,
            prefix_caching=prefix_caching,
            from_lists=implementation == "pagedattn_from_lists",
        )

    return make


@pytest.fixture(scope="module")
def played():
    """Seconds and columns of what was timed, by row without its implementation."""
    return {}


@pytest.fixture
def play(request, benchmark, implementation, played):
    """Time all implementations of a row by turns, once, and report this one's rounds.

    A contender has `prepare` and `run`, `check`, which is called in the end, and `columns`, what
    its row says besides times.
    """

    def once(make, rounds=ROUNDS, turn=5, warmup=WARMUP, *, as_one=False):
        (names,) = (
            mark.args[1]
            for mark in request.node.iter_markers("parametrize")
            if mark.args[0] == "implementation"
        )
        params = request.node.callspec.params
        row = (request.node.originalname, *(params[name] for name in params.keys() - {OWN}))
        if row not in played:
            contenders = {name: make(name) for name in names}
            seconds = time_by_turns(contenders, rounds, turn=turn, warmup=warmup)
            for contender in contenders.values():
                contender.check()
            columns = {name: contender.columns() for name, contender in contenders.items()}
            played[row] = seconds, columns
        seconds, columns = (given[implementation] for given in played[row])
        if as_one:
            seconds = [sum(seconds)]
        following = iter(seconds)
        benchmark.pedantic(lambda: CLOCK.advance(next(following)), rounds=len(seconds))
        benchmark.extra_info.update(columns)

    return once


@pytest.fixture
def describe_row(benchmark, implementation):
    """Group a row and fill its columns."""

    def fill(operation, workload, block_size, num_sequences=None, **more):
        benchmark.group = ", ".join(
            [operation, workload, *([f"{num_sequences} sequences"] if num_sequences else [])]
        )
        benchmark.extra_info.update(
            area="block_manager",
            operation=operation,
            implementation=implementation,
            workload=workload,
            device="cpu",
            num_sequences=num_sequences,
            block_size=block_size,
            **more,
        )

    return fill
