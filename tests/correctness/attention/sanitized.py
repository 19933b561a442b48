"""Small cases of the CUDA kernels, to be run under compute-sanitizer: see test_sanitizer.py.

Runs those that are named, each of which it says to be right when it is.
"""

import contextlib
import sys
from unittest import mock

import torch

from pagedattn.attention import get_implementation, write_kv
from pagedattn.attention.cuda import decode, mixed, prefill
from pagedattn.attention.cuda.prefill_choice import Way
from pagedattn.attention.cuda.prefill_config import Cut
from pagedattn.testing import check_attention, make_inputs
from pagedattn.testing.tolerance import known_roundings
from pagedattn.workloads import AttentionShape

from .bounds import with_bound

# query lengths, KV lengths, changes of the shape, and what the host takes all lengths for
CASES = {
    "decode": ((1,) * 5, (1, 15, 16, 333, 3000), {}),
    "guessed": ((1,) * 5, (333,) * 5, {"head_size": 64}, 333),
    "guessed wrong": ((1,) * 5, (1, 15, 700, 333, 300), {}, 700),
    "guessed wrong of many": ((1,) * 200, (100, 20) * 100, {"head_size": 64}, 400),
    "gather": ((1,) * 3, (7, 33, 1500), {"block_size": 1}),
    "around the ring": ((1, 1), (2000, 1000), {}),
    "gather around the ring": ((1, 1), (2000, 1000), {"block_size": 1}),
    "lines around the ring": ((1, 1), (2000, 1000), {"head_size": 80}),
    "fp8 around the ring": ((1, 1), (4000, 1000), {"kv_dtype": "float8_e4m3"}),
    "lines": ((1,) * 3, (7, 33, 1500), {"head_size": 80}),
    "lines of large blocks": ((1,) * 3, (7, 133, 1500), {"head_size": 80, "block_size": 128}),
    "short": ((1,) * 3, (7, 33, 500), {}),
    "many short": ((1,) * 80, tuple(range(1, 401, 5)), {}),
    "of one length": ((1,) * 4, (600,) * 4, {}),
    "one long": ((1,), (20_000,), {}),
    "many": ((1,) * 200, (100,) * 200, {}),
    "verify": ((4,) * 3, (4, 40, 700), {}),
    "fp8": ((1,) * 3, (7, 33, 1500), {"kv_dtype": "float8_e4m3"}),
    "decode with options": (
        *((1,) * 3, (7, 333, 1500)),
        {"window": 300, "soft_cap": 10.0, "sinks": True},
    ),
    "prefill": ((1, 70, 300), (1, 70, 300), {}),
    "chunk": ((40, 1, 130), (333, 64, 500), {}),
    "sorted chunks": ((9,) * 40, (*range(9, 199, 5), 20, 33), {}),
    "chunks too many to be sorted": (
        *((40, *(9,) * 192), (60, *(9, 40) * 96)),
        {"num_query_heads": 2, "num_kv_heads": 1, "head_size": 64},
    ),
    "chunk whose keys are shared out": ((40, 1), (3000, 333), {}),
    "drafts of which some are shared out": ((5,) * 4, (3000, 20, 333, 700), {}),
    "many drafts of which one is shared out": ((5,) * 40, (2500, *range(10, 205, 5)), {}),
    "chunk beside a long decode": ((300, 1, 1, 2), (700, 20_000, 33, 4000), {}),
    "chunk and decodes by two launches": ((300, 1, 1, 2), (700, 20_000, 33, 4000), {}),
    "chunk by small tiles": (
        *((40, 1, 230), (333, 64, 500)),
        {"head_size": 64, "window": 100},
    ),
    "chunk of small heads": ((40, 1, 230), (333, 64, 500), {"head_size": 64}),
    # of seven heads four, and three
    "chunk of parts of heads": ((40, 1, 130), (333, 64, 500), {"num_query_heads": 14}),
    "chunk over fp8": ((40, 1, 130), (333, 64, 500), {"kv_dtype": "float8_e4m3"}),
    "many chunks of each program": ((40, 9, 70) * 4, (60, 300, 70) * 4, {}),
    "many chunks over fp8 of each program": (
        *((40, 9, 70) * 4, (60, 300, 70) * 4),
        {"kv_dtype": "float8_e4m3"},
    ),
    # by three terms and by five
    "chunk under a high soft cap": ((40, 1, 130), (333, 64, 500), {"soft_cap": 50.0}),
    # by five terms and by the formula
    "chunk under a soft cap": ((40, 1, 130), (333, 64, 500), {"soft_cap": 23.0}),
    # groups multiply in an order
    "chunk with ALiBi": ((40, 1, 230), (333, 64, 500), {"alibi": True}),
}
CUTS = {
    "chunk": Cut(2, 128),
    "sorted chunks": Cut(2, 128),
    "chunks too many to be sorted": Cut(2, 128),
    "chunk of small heads": Cut(3, 128),
    "chunk by small tiles": Cut(3, 64),
    "chunk of parts of heads": Cut(2, 128, 2),
    "chunk over fp8": Cut(2, 128),
    "many chunks of each program": Cut(2, 64),
    "many chunks over fp8 of each program": Cut(2, 128),
    "chunk under a high soft cap": Cut(2, 128),
    "chunk under a soft cap": Cut(2, 128),
    "chunk with ALiBi": Cut(2, 128),
}
"""Tiles of long prompts; small cases would go by (2, 64), as "prefill" does."""
SHARED_OUT = {
    "chunk whose keys are shared out",
    "drafts of which some are shared out",
    "many drafts of which one is shared out",
}
"""Among 8 for the longest; the emulator's few programs would have none."""
BY_FP8 = {"chunk over fp8", "many chunks over fp8 of each program"}
"""Are multiplied in fp8 too."""
FEW_PROGRAMS = 3
AROUND = {
    "around the ring",
    "gather around the ring",
    "lines around the ring",
    "fp8 around the ring",
    "many chunks of each program",
    "many chunks over fp8 of each program",
}
"""Have so few, which go around the rings of shared memory."""
BY_TWO = "chunk and decodes by two launches"
"""Is what takes longer for a batch so small."""


def check_case(name, implementation, device):
    """Attend over a case by an implementation, with its options, and compare with float64."""
    query_lengths, kv_lengths, changes, *bound = CASES[name]
    inputs = make_inputs(
        AttentionShape(
            name, query_lengths, kv_lengths, **{"num_query_heads": 8, "num_kv_heads": 2} | changes
        ),
        device=device,
    )
    if bound:
        inputs = with_bound(inputs, *bound)
    call = inputs.call(torch.full_like(inputs.query, torch.nan))
    assert (reason := implementation.unsupported(call)) is None, reason
    with (
        mock.patch.object(prefill, "way_of", wraps=prefill.way_of) as way_of,
        mock.patch.object(mixed, "pays", wraps=mixed.pays) as pays,
        contextlib.ExitStack() as few,
    ):
        if name in CUTS:
            way_of.return_value = Way(CUTS[name], 1, 0.0)
        if name in SHARED_OUT:
            way_of.return_value = Way(Cut(2, 128), 8, 0.0)
        if name == BY_TWO:
            pays.return_value = True
        if name in AROUND:
            for module in (decode, prefill):
                few.enter_context(
                    mock.patch.object(module, "num_multiprocessors", return_value=FEW_PROGRAMS)
                )
        implementation.attention(call)
    assert way_of.called or name not in {*CUTS, *SHARED_OUT}
    rounded_to, _ = known_roundings(implementation, call)
    check_attention(call.out, inputs, rounded_to=rounded_to)
    return inputs


def main(names):
    for name in names:
        inputs = check_case(name, get_implementation("cuda"), "cuda")
        if name in BY_FP8:
            check_case(name, get_implementation("cuda_fp8"), "cuda")
        write_kv(inputs.key, inputs.value, inputs.cache, inputs.batch.slots, implementation="cuda")
        torch.cuda.synchronize()
        print(f"{name} is right")


if __name__ == "__main__":
    main(sys.argv[1:])
