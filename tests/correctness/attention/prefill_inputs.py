"""Inputs of the Hopper prefill kernel, for tests on a GPU and for those of what it takes."""

import dataclasses

import torch

from pagedattn.testing import make_inputs
from pagedattn.workloads import AttentionShape

HEADS = {"one": (1, 1), "mha": (4, 4), "gqa": (8, 2), "group3": (9, 3), "mqa": (71, 1)}
RAGGED = ((1, 5, 1, 40, 3, 100), (1, 15, 16, 47, 37, 333))
LONG = ((700, 1, 1, 64, 130), (700, 1500, 33, 64, 999))
FEATURES = {
    "plain": {},
    "window": {"window": 150},
    "short-window": {"window": 3},
    "cap": {"soft_cap": 2.0},
    "high cap": {"soft_cap": 50.0},
    "alibi": {"alibi_slopes": True},
    "sinks": {"sinks": True},
    "all": {"window": 200, "soft_cap": 3.0, "alibi_slopes": True, "sinks": True},
}

CACHES = {"16-bit": None, "fp8": "float8_e4m3"}


def inputs_of(
    lengths,
    heads="gqa",
    head_size=128,
    block_size=16,
    dtype="bfloat16",
    kv_dtype=None,
    device="cuda",
    **features,
):
    shape = AttentionShape("test", *lengths, *HEADS[heads], head_size, block_size, dtype, kv_dtype)
    inputs = make_inputs(shape, device=device, seed=head_size + block_size)
    made = {
        name: torch.rand(HEADS[heads][0], device=device) if value is True else value
        for name, value in features.items()
    }
    return dataclasses.replace(inputs, **made)
