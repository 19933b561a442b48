"""The modules of FlashInfer that rows need are those that their calls use, and no others."""

import pytest

from pagedattn.attention import get_implementation
from pagedattn.peers.flashinfer import FlashInferKernel, Traits, needs
from pagedattn.peers.kernels import FLASHINFER_KERNELS
from pagedattn.testing import make_inputs
from pagedattn.workloads import find_shape

OPTIONS = {
    "window": "-window8",
    "soft_cap": "-cap50",
    "alibi": "-alibi",
    "sinks": "-sinks",
    "fp8": "-fp8",
}
NAMES = ["decode-B2-40", *(f"decode-B2-40-h8x2-d64{said}" for said in OPTIONS.values())]


def needed(kernel, *names):
    return needs.of_benchmarks(kernel, [find_shape(name) for name in names])


@pytest.mark.parametrize("name", [*NAMES, "chunk-8-over-40-block8-window8-cap50-alibi-sinks-fp8"])
def test_traits_of_a_shape_are_those_of_its_call(name):
    shape = find_shape(name)
    call = make_inputs(shape).call()
    traits = needs.traits_of(shape)
    assert traits == Traits.of(call)
    assert traits.features == call.features


@pytest.mark.parametrize("kernel", FLASHINFER_KERNELS)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_kernel_needs_modules_of_the_options_that_it_has(kernel, option):
    implementation = get_implementation(kernel)
    assert isinstance(implementation, FlashInferKernel)
    name = f"decode-B2-40-h8x2-d64{OPTIONS[option]}"
    traits = needs.traits_of(find_shape(name))
    has = option in implementation.features and not implementation.needs_shared_prefix
    assert needed(kernel, name) == (set(implementation.specs(traits)) if has else set())
    assert implementation.suits(traits) == (option in implementation.features)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("flashinfer_fa2", "-cap50-sinks"),
        ("flashinfer_fa2", "-alibi-sinks"),
        ("flashinfer_fa2", "-sinks-fp8"),
        ("flashinfer_fa3", "-window8-fp8"),
        ("flashinfer_fa3", "-cap50-fp8"),
        ("flashinfer_fa3", "-cap50-sinks"),
    ],
)
def test_options_that_a_kernel_does_not_do_together_need_no_module(kernel, said):
    call = make_inputs(find_shape(f"prefill-40-d64{said}")).call()
    implementation = get_implementation(kernel)
    assert call.features <= implementation.features
    assert "too" in implementation.clash(call.features)
    assert needed(kernel, f"prefill-40-d64{said}") == set()


def test_a_window_and_none_are_two_modules():
    plain, window = (needed("flashinfer_fa3", f"prefill-8k{said}") for said in ("", "-window1k"))
    assert plain
    assert window
    assert not plain & window
