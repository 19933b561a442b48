"""Each way in which the CUDA kernels can take a call: that it is one, right, and has a name."""

import dataclasses

import pytest

from pagedattn.testing import make_inputs
from pagedattn.workloads import DRAWN_KINDS, AttentionShape, drawn_shapes

pytest.importorskip("triton")

from pagedattn.attention.cuda import (
    decode,
    decode_calls,
    mixed,
    prefill,
    prefill_merge,
    ways,
)
from pagedattn.attention.cuda.decode_division import CLUSTERS, WholeRows, clusters_of
from pagedattn.testing.emulator import emulation, unavailable

from .emulated import check, inputs_of, nightly

emulated = pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")


@pytest.fixture
def launched_by_none(monkeypatch):
    """A GPU of 132 multiprocessors on which nothing is compiled or launched."""

    class Kernel:
        def most_clusters(self, *sizes):
            return CLUSTERS[sizes[-1]]

    for launcher in (decode, prefill, prefill_merge):
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
        names = list(ways.ways_of(call_of((1,) * 2, (1024,) * 2)))
        assert kernels_of(names) == {"decode"}
        for word in ("2 programs", "clusters of 2", "clusters of 4", "whole rows"):
            assert any(word in name for name in names), word

    def test_rows_of_one_length_are_whole_where_a_name_says_so(self):
        call = call_of((1,) * 3, (1000,) * 3)
        _, row_bytes = decode_calls.longest_row(call)
        found = {n: w for n, w in ways.ways_of(call).items() if "clusters" not in n}
        whole = {name for name, way in found.items() if row_bytes <= way.whole.most_bytes}
        assert whole == {name for name in found if "whole rows" in name}
        assert 0 < len(whole) < len(found)

    @pytest.mark.parametrize("shape", [(1, 512), (1, 8192), (2, 4096), (3, 700), (8, 300)], ids=str)
    @pytest.mark.parametrize("heads", [(32, 8), (8, 1), (28, 4)], ids=str)
    def test_whatever_clusters_the_estimate_might_choose_are_among_the_ways(self, shape, heads):
        count, length = shape
        call = call_of((1,) * count, (length,) * count, heads)
        launches = ways.ways_of(call).values()
        row_heads, _, _ = decode_calls.divide(call, 132, 1)
        rows = count * heads[1] // row_heads
        found = {
            (way.config.cluster, way.num_ranges // rows)
            for way in launches
            if way.config.cluster > 1
        }
        possible = set()
        for cluster, at_once in CLUSTERS.items():
            most = min(132 // row_heads // rows // cluster, at_once // (rows * row_heads), 20)
            for each in {1, most} if cluster == max(CLUSTERS) else {1}:
                if 0 < each <= most and each * cluster * 16 <= length:
                    possible.add((cluster, each * cluster))
        assert possible <= found
        sizes = rows, row_heads, 132, *decode_calls.longest_row(call), decode_calls.kind_of(call)
        assert clusters_of(*sizes) in {(1, 0), *found}

    @pytest.mark.parametrize(
        ("num_rows", "ranges", "divisions"),
        [
            (40, 16, {(3, 0), (5, 0), (2, 8)}),
            (32, 16, {(2, 0), (4, 0)}),
            (5, 16, {(1, 0)}),
            (1, 1, {(1, 0)}),
        ],
    )
    def test_whole_rows_are_divided_in_each_way_that_the_estimate_looks_at(
        self, num_rows, ranges, divisions
    ):
        found = {(way.of_range, way.more) for way in WholeRows.ways(num_rows, ranges)}
        assert found == divisions

    def test_two_programs_whose_registers_do_not_suffice_are_no_way(self):
        names = ways.ways_of(call_of((1,) * 6, (600,) * 6, (64, 4), head_size=256))
        assert not any("2 programs" in name for name in names)
        by_rows = [n for n in names if n.startswith("decode") and "clusters" not in n]
        assert len(by_rows) == 2  # cut and whole, once each

    def test_names_tell_how_whole_rows_are_divided(self):
        names = [
            name for name in ways.ways_of(call_of((1,) * 40, (512,) * 40)) if "2 pro" not in name
        ]
        for words in ("3 a range", "5 a range", "2 a range and one more in 8"):
            assert sum(name.endswith(f"whole rows, {words}") for name in names) == 1

    def test_a_ragged_decode_has_no_clusters(self):
        names = list(ways.ways_of(call_of((1,) * 3, (1024, 700, 64))))
        assert not any("clusters" in name for name in names)
        assert {"whole rows" in name for name in names} == {True, False}
        assert {"rows begin with a range" in name for name in names} == {True, False}

    def test_ragged_rows_are_whole_where_cutting_would_take_longer(self):
        for lengths, is_whole in (
            ((900, 70, 64), False),
            ((300, 70, 64), True),
            ((9000,) * 15 + (8800,), True),
            ((9000,) * 15 + (7000,), True),
            ((9000,) * 8 + (5000,) * 8, False),
            ((65_536,) * 15 + (65_400,), True),
            ((9000,) * 20 + (8800,), False),  # more than there are ranges
        ):
            names = list(ways.ways_of(call_of((1,) * len(lengths), lengths)))
            assert ("whole rows" in names[0]) == is_whole, lengths

    def test_rows_are_compared_by_what_a_window_leaves_of_them(self):
        lengths = (5000,) + (700,) * 15
        for window, is_whole in ((None, False), (300, True)):
            (name, *_) = ways.ways_of(call_of((1,) * 16, lengths, window=window))
            assert ("whole rows" in name) == is_whole

    def test_tiles_are_large_where_rows_of_several_lengths_stay_whole(self):
        for lengths, tile in (((200, 90, 150, 70), 64), ((1000, 90, 150, 70), 16)):
            config = ways.chosen_way(call_of((1,) * 4, lengths, (8, 1), head_size=64)).config
            assert (config.tile, config.keeps_whole) == (tile, True)
            # where they are likely to be cut, each may begin with a range
            assert config.aligns == (tile == 16)

    def test_a_batch_of_a_much_larger_bound_is_cut_as_one_of_other_lengths(self):
        usual = call_of((1,) * 15, (1500, 1450) * 7 + (1480,))
        for bound, is_whole in ((1500, True), (2500, True), (3500, False)):
            batch = dataclasses.replace(usual.batch, max_kv_length=bound)
            config = ways.chosen_way(dataclasses.replace(usual, batch=batch)).config
            assert config.keeps_whole == is_whole, bound

    def test_ragged_rows_that_all_have_a_program_may_stay_whole_to_compare(self):
        names = list(ways.ways_of(call_of((1,) * 3, (9000, 700, 64))))
        assert ["whole rows" in name for name in names].count(True) == 2
        names = list(ways.ways_of(call_of((1,) * 40, (9000,) * 39 + (64,))))
        assert not any("whole rows" in name for name in names)

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
    "prompts": ((70, 40), (70, 40), {"heads": (4, 2)}),
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
