"""On which implementations the suite runs, and how what one does not take is skipped.

A test that takes `implementation` runs on this project's own and, on a GPU, on the peers; those
that `--impl` names replace all of them. `@pytest.mark.implementations("triton", ...)` names
others for one test. A peer is run in bfloat16 and with one grouping of heads; `--impl` runs all.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from pagedattn.attention import UnsupportedError, get_implementation
from pagedattn.peers import FLASHINFER_KERNELS, PEERS
from pagedattn.testing import finite

OWN = ("torch", "triton")
GPU = torch.cuda.is_available()


def pytest_generate_tests(metafunc):
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "implementation" not in metafunc.fixturenames or "implementation" in own:
        return
    marker = metafunc.definition.get_closest_marker("implementations")
    usual = marker.args if marker else (*OWN, *PEERS)
    metafunc.parametrize("implementation", metafunc.config.option.impl or usual)


def _device(item):
    params = item.callspec.params
    return params.get("device") or params.get("on", ("cuda",))[0]


def _is_usual(item):
    """Whether a session without --impl has this case: a peer's are the fewer."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if params.get("implementation") not in PEERS:
        return True
    return _device(item) == "cuda" and (
        item.get_closest_marker("implementations") is not None
        or (
            params.get("on", ("cuda", "bfloat16"))[1] == "bfloat16"
            and params.get("heads", "gqa") == "gqa"
        )
    )


def pytest_collection_modifyitems(config, items):
    if config.option.impl is not None:
        return
    here = Path(__file__).parent
    items[:] = [item for item in items if here not in item.path.parents or _is_usual(item)]


@pytest.fixture(autouse=True)
def runnable(request, monkeypatch):
    """Skip what cannot run here, and give an implementation the finite slots that it needs."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    name = params.get("implementation")
    if name is None:
        return
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is not installed")
    if name == "triton" and GPU and _device(request.node) == "cpu":
        pytest.skip("beside a GPU, Triton compiles for it and does not interpret")
    if name in FLASHINFER_KERNELS:
        request.getfixturevalue("flashinfer_modules")
    made = get_implementation(name)
    if getattr(made, "reads_unused_slots", False):
        attend = made.attention

        def with_finite_slots(call):
            with finite(call.cache):
                attend(call)

        monkeypatch.setattr(made, "attention", with_finite_slots)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip what an implementation does not take; this project's own take all that is tested."""
    params = getattr(getattr(pyfuncitem, "callspec", None), "params", {})
    try:
        return (yield)
    except UnsupportedError as refusal:
        if params.get("implementation") in (None, *OWN):
            raise
        pytest.skip(str(refusal))
