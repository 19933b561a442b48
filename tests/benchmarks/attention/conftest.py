"""What the rows of attention share: who takes part in a case, and how rounds are told."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from pagedattn.benchmarking import DEVICE_CLOCK


def pytest_collection_modifyitems(items):
    for item in items:
        if "report_rounds" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=DEVICE_CLOCK))


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
