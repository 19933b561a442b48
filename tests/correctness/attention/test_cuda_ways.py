"""Each way in which the CUDA kernels can take a call: that it is one, right, and has a name."""

import pytest

from pagedattn.testing import make_inputs
from pagedattn.workloads import DRAWN_KINDS, AttentionShape, drawn_shapes

pytest.importorskip("triton")

from pagedattn.attention.cuda import decode, decode_calls, mixed, prefill, ways
from pagedattn.testing.emulator import emulation, unavailable

from .emulated import check, inputs_of, nightly

emulated = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")


@pytest.fixture
def launched_by_none(monkeypatch):
    """A GPU of 132 multiprocessors on which nothing is compiled or launched."""

    class Kernel:
        def most_clusters(self, *sizes):
            return 132 // sizes[-1]

    for launcher in (decode, prefill):
        monkeypatch.setattr(launcher, "load_kernel", lambda *_: Kernel())
    for each in (decode, prefill, ways):
        monkeypatch.setattr(each, "num_multiprocessors", lambda _: 132)


def call_of(queries, kv_lengths, heads=(32, 8), **changes):
    values = {"head_size": 128, "block_size": 16, "dtype": "bfloat16"} | changes
    return make_inputs(AttentionShape("test", queries, kv_lengths, *heads, **values)).call()


def kernels_of(names):
    return {name.partition(":")[0] if ";" not in name else "both" for name in names}


@pytest.mark.usefixtures("launched_by_none")
class TestNames:
    def test_an_even_decode_has_clusters_and_whole_rows(self):
        names = list(ways.ways_of(call_of((1,) * 4, (1024,) * 4)))
        assert kernels_of(names) == {"decode"}
        for word in ("2 programs", "clusters of 2", "clusters of 4", "whole rows"):
            assert any(word in name for name in names), word

    def test_rows_of_one_length_are_whole_where_a_name_says_so(self):
        call = call_of((1,) * 3, (1000,) * 3)
        _, row_bytes = decode_calls.longest_row(call)
        found = {n: w for n, w in ways.ways_of(call).items() if "clusters" not in n}
        whole = {name for name, way in found.items() if row_bytes <= way.most_whole_bytes}
        assert whole == {name for name in found if "whole rows" in name}
        assert 0 < len(whole) < len(found)

    def test_a_ragged_decode_has_no_clusters(self):
        names = list(ways.ways_of(call_of((1,) * 3, (1024, 700, 64))))
        assert not any("clusters" in name for name in names)
        assert {"whole rows" in name for name in names} == {True, False}

    def test_drafts_have_either_kernel(self):
        assert kernels_of(ways.ways_of(call_of((4,) * 3, (1024, 700, 64)))) == {"decode", "prefill"}

    def test_a_chunk_has_tiles_parts_of_heads_and_shares(self):
        names = list(ways.ways_of(call_of((128,), (4096,), (48, 1))))
        assert kernels_of(names) == {"prefill"}
        for word in (
            "by 64",
            "by 128",
            "heads in 3 parts",
            "keys in 2 shares",
            "keys in 32 shares",
        ):
            assert any(word in name for name in names), word

    def test_keys_are_not_shared_out_among_more_than_there_are_tiles(self):
        names = ways.ways_of(call_of((128,), (300,)))
        assert max(int(n.split("in ")[1].split()[0]) for n in names if "shares" in n) == 3

    def test_a_mixed_batch_has_one_launch_and_two(self):
        found = ways.ways_of(call_of((300, 1, 1), (400, 900, 64)))
        assert kernels_of(found) == {"prefill", "both"}
        assert sum(isinstance(launch, mixed.MixedLaunch) for launch in found.values()) == 1

    def test_the_chosen_way_is_the_first(self):
        for shape in drawn_shapes(DRAWN_KINDS, 1, seed=5):
            small = tuple(min(length, 200) for length in shape.kv_lengths)
            call = call_of(
                tuple(min(q, k) for q, k in zip(shape.query_lengths, small, strict=True)), small
            )
            found = ways.ways_of(call)
            assert next(iter(found)) == ways.name_of(ways.chosen_way(call), call)
            assert [ways.name_of(launch, call) for launch in found.values()] == list(found)

    def test_what_triton_takes_has_none(self):
        with pytest.raises(ValueError, match="the CUDA kernels cannot take queries of"):
            ways.ways_of(call_of((1,), (64,), dtype="float32"))


BATCHES = {
    "even": ((90,) * 3, 1, {}),
    "ragged": ((90, 17, 200), 1, {"head_size": 128}),
    "drafts": ((90, 250), 4, {"heads": (8, 2)}),
    "chunk": ((400,), 40, {"heads": (6, 1), "dtype": "bfloat16"}),
    "mixed": ((150, 200, 30), (70, 1, 1), {"heads": (4, 2)}),
}


@emulated
@pytest.mark.parametrize(
    "case", ["even", *(pytest.param(name, marks=nightly) for name in BATCHES if name != "even")]
)
def test_every_way_gives_the_same(case):
    kv_lengths, queries, options = BATCHES[case]
    inputs = inputs_of(kv_lengths, queries, **options)
    with emulation(6):
        names = list(ways.ways_of(inputs.call()))
    assert len(names) > 2
    for name in names:
        check(inputs, lambda call, name=name: ways.ways_of(call)[name], seeds=(0,))
