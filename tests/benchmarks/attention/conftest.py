"""What the rows of attention share: who takes part in a case, and PyTorch's back ends.

A row that takes `implementation` runs on those of `@pytest.mark.implementations(...)`, and before
them on those that `--impl` names.
"""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        usual = metafunc.definition.get_closest_marker("implementations").args
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
