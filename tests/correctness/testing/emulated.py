"""How tests run the small kernels of emulated.cu."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pagedattn.attention.cuda.module import TensorMap
from pagedattn.testing.emulator import EmulatedKernel, unavailable

SOURCE = Path(__file__).with_name("emulated.cu")
SEEDS = range(8)
needs_a_compiler = pytest.mark.skipif(
    unavailable() is not None, reason=f"emulation: {unavailable()}"
)


class Parameters(ctypes.Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("map", "other")),
        *((name, ctypes.c_void_p) for name in ("given", "with_", "out")),
        *((name, ctypes.c_int) for name in "abcdef"),
        ("name", ctypes.c_char * 32),
        ("padding", ctypes.c_char * 48),
    )


def run(
    name, *numbers, threads=32, programs=1, seed=0, shared_bytes=32768,
    bf16=0, fp8=0, fp8_products=0, **fields
):  # fmt: skip
    """Run one of the small kernels; tensors are passed by where they lie."""
    parameters = Parameters(name=name.encode())
    for field, value in [*zip("abcdef", numbers, strict=False), *fields.items()]:
        is_array = isinstance(value, (torch.Tensor, np.ndarray))
        setattr(parameters, field, address_of(value) if is_array else value)
    macros = (("BF16", bf16), ("FP8", fp8), ("FP8_PRODUCTS", fp8_products))
    emulated = EmulatedKernel(SOURCE, "kernel", macros, seed)
    emulated.launch(programs, threads, shared_bytes, parameters)


def address_of(array):
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data
