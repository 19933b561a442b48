"""Which implementations the suite runs over, where, and how a case that one cannot take is told."""

import pytest
import torch

from pagedattn.attention import attention, get_implementation, write_kv

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
OWN = ("reference", "torch", "triton", *(["cuda"] if HOPPER else []))
"""The project's own implementations, which have to support every feature."""

FP8_CAPABILITY = (8, 9)
"""The exception: older GPUs have no fp8, and Triton none on them."""


def pytest_generate_tests(metafunc):
    """Run each test that asks for an `implementation` over all that are under test."""
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", OWN)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def require(implementation, device):
    """Skip where an implementation cannot run at all."""
    if implementation == "cuda" and device == "cpu":
        pytest.skip("its kernels need a GPU")
    if implementation == "triton":
        pytest.importorskip("triton")
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("beside a GPU, Triton compiles for it and does not interpret")


def skip_unsupported(implementation, call):
    """Skip a case that an implementation cannot take, with its phrase; its own must take all.

    Raises:
        Failed: the project's own implementation says that it cannot.

    """
    reason = get_implementation(implementation).unsupported(call)
    if reason is None:
        return
    old_gpu = call.query.is_cuda and torch.cuda.get_device_capability() < FP8_CAPABILITY
    if implementation in OWN and not (old_gpu and "fp8" in call.features):
        pytest.fail(f"{implementation} cannot take a listed feature: {reason}")
    pytest.skip(f"{implementation}: {reason}")


@pytest.fixture
def attend():
    """Function that runs a case through an implementation, or skips it; see its docstring."""

    def run(inputs, implementation, *, out=None, return_lse=False, scale=None):
        """Attend over the inputs; `out` is filled with NaN first unless given.

        Returns what `attention` does.
        """
        require(implementation, inputs.query.device.type)
        lse = torch.empty(inputs.query.shape[:2], device=inputs.query.device)
        skip_unsupported(implementation, inputs.call(lse=lse if return_lse else None))
        if out is None:
            out = torch.full_like(inputs.query, torch.nan)
        return attention(
            inputs.query,
            inputs.cache,
            inputs.batch,
            out=out,
            return_lse=return_lse,
            scale=scale,
            implementation=implementation,
            **inputs.options,
        )

    return run


@pytest.fixture
def write(device):
    """`write_kv`, skipped where the implementation cannot run."""

    def run(*args, implementation):
        require(implementation, device)
        write_kv(*args, implementation=implementation)

    return run
