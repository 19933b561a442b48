"""How rows tell pytest-benchmark rounds that were timed by turns."""

import pytest

from pagedattn.benchmarking import DEVICE_CLOCK


def pytest_collection_modifyitems(items):
    for item in items:
        if "report_rounds" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=DEVICE_CLOCK))


@pytest.fixture
def report_rounds(benchmark):
    """Function that tells pytest-benchmark rounds that were timed already; returns the median."""

    def report(rounds):
        seconds = iter(rounds.seconds)
        benchmark.pedantic(
            lambda: DEVICE_CLOCK.advance(next(seconds)),
            rounds=len(rounds.seconds),
            warmup_rounds=0,
        )
        benchmark.extra_info.update(rounds.columns())
        return benchmark.stats.stats.median

    return report
