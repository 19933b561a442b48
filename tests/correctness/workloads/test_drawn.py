"""Batches that are drawn: of the kind that they are named after, the same ones every time."""

import pytest

from pagedattn.workloads import DRAWN_KINDS, drawn_shapes
from pagedattn.workloads.drawn import MOST_BYTES, MOST_FLOPS


@pytest.mark.parametrize("kind", DRAWN_KINDS)
def test_a_kind_is_what_it_is_called(kind):
    for shape in drawn_shapes([kind], 30, seed=1):
        queries, kv_lengths = shape.query_lengths, shape.kv_lengths
        if kind in ("even", "ragged"):
            assert shape.kind == "decode"
            is_even = len(set(kv_lengths)) == 1
            assert is_even == (kind == "even") or shape.num_sequences <= 3
        elif kind == "drafts":
            assert len(set(queries)) == 1
            assert 2 <= queries[0] <= 8
        elif kind == "prompts":
            assert shape.kind == "prefill"
        elif kind == "chunks":
            assert len(set(queries)) == 1
            assert queries[0] >= 64
        else:
            assert 1 <= sum(length > 8 for length in queries) <= 4 < shape.num_sequences
        assert shape.kv_bytes <= MOST_BYTES
        assert shape.flops <= MOST_FLOPS


def test_batches_depend_on_the_seed_and_on_their_kind_alone():
    first = drawn_shapes(["even", "mixed"], 4, seed=0)
    assert drawn_shapes(["mixed"], 4, seed=0) == first[4:]
    assert drawn_shapes(["mixed"], 2, seed=0) == first[4:6]
    lengths = [shape.kv_lengths for shape in first]
    assert [shape.kv_lengths for shape in drawn_shapes(["even", "mixed"], 4, seed=1)] != lengths
    assert len(set(lengths)) == 8


def test_batches_are_named_after_their_kind_and_seed():
    names = [shape.name for shape in drawn_shapes(["even", "chunks"], 2, seed=7)]
    assert names == [f"{kind}-{i}-of-seed-7" for kind in ("even", "chunks") for i in (0, 1)]


def test_lengths_and_heads_vary():
    shapes = drawn_shapes(DRAWN_KINDS, 10, seed=0)
    assert len({(shape.num_query_heads, shape.num_kv_heads) for shape in shapes}) >= 4
    assert max(max(shape.kv_lengths) for shape in shapes) > 8000
    assert min(max(shape.kv_lengths) for shape in shapes) < 500
