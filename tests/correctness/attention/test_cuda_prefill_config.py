"""How the prefill kernel is cut: shares of keys, and heads that are worked on together."""

from types import SimpleNamespace

import pytest
import torch

from pagedattn.attention.cuda.prefill_config import section_heads, splits_of


def splits_for(queries, kv_length, *, heads=(32, 8), head_size=128, options=None):
    inputs = SimpleNamespace(
        query=torch.empty((sum(queries), heads[0], head_size), device="meta"),
        cache=SimpleNamespace(head_size=head_size, num_kv_heads=heads[1], dtype=torch.bfloat16),
        batch=SimpleNamespace(
            num_sequences=len(queries),
            max_query_length=max(queries),
            expected_kv_length=kv_length,
        ),
    )
    call = SimpleNamespace(**vars(inputs), out=inputs.query, causal=True, window=None)
    vars(call).update(options or {})
    return splits_of(call, num_programs=132)


@pytest.mark.parametrize(
    ("queries", "kv_length", "options", "splits"),
    [
        ((512,), 8192, {}, 1),  # an item for each of 128 programs
        ((544,), 8192, {}, 4),  # a few more
        ((256,), 32_768, {}, 2),
        ((128,), 16_384, {}, 4),
        ((128,), 16_384, {"window": 300}, 1),  # few tiles of keys
        ((128,), 16_384, {"causal": False}, 1),  # a part of shared blocks
        ((256,), 256, {}, 1),  # a prompt
        ((64,) * 64, 8192, {}, 1),  # who is done first takes what is left
        ((8,) * 4, 8192, {}, 4),
    ],
)
def test_keys_are_shared_out_where_query_tiles_are_few(queries, kv_length, options, splits):
    assert splits_for(queries, kv_length, options=options) == splits


@pytest.mark.parametrize(
    ("num_kv_heads", "head_bytes", "heads"),
    [(8, 4 << 20, 8), (8, 16 << 20, 4), (6, 16 << 20, 3), (8, 1 << 30, 1), (7, 16 << 20, 1)],
)
def test_as_many_heads_are_worked_on_together_as_fit_and_divide(num_kv_heads, head_bytes, heads):
    assert section_heads(num_kv_heads, head_bytes) == heads
