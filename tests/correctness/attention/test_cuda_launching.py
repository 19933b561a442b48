"""A call's signature decides how it is launched, and addresses are taken from each call."""

import dataclasses
import sys
import weakref

import numpy as np
import pytest
import torch

from pagedattn.attention.batch_memory import NUM_ARRIVALS
from pagedattn.attention.cuda import decode, decode_map, prefill, prefill_map, prefill_merge
from pagedattn.attention.cuda.launching import signature_of, table_lines_of
from pagedattn.attention.cuda.mixed import MixedLaunch
from pagedattn.attention.cuda.module import TensorMap
from pagedattn.attention.cuda.module import _maps as shared_maps
from pagedattn.attention.cuda.prefill_choice import Way
from pagedattn.attention.cuda.prefill_config import Cut
from pagedattn.attention.known_lengths import KnownLengths
from pagedattn.testing import make_inputs
from pagedattn.workloads import AttentionShape

ROWS = {"num_query_heads": 8, "num_kv_heads": 2, "head_size": 64, "block_size": 16}


def call_of(seed=0, lse=False, **changes):
    options = {name: changes.pop(name) for name in list(changes) if name in OPTIONS}
    values = {"query_lengths": (1, 1), "kv_lengths": (40, 100), "dtype": "bfloat16"} | ROWS
    inputs = make_inputs(AttentionShape("small", **(values | changes)), seed=seed, **options)
    return inputs.call(lse=torch.empty(inputs.query.shape[:2]) if lse else None)


OPTIONS = {"window": 30, "soft_cap": 3.0, "alibi": True, "sinks": True}


def test_calls_that_differ_in_contents_and_places_alone_have_one_signature():
    first, second = call_of(seed=0), call_of(seed=1)
    assert first.query.data_ptr() != second.query.data_ptr()
    assert signature_of(first) == signature_of(second)
    hash(signature_of(first))


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name, value in OPTIONS.items()),
        {"lse": True},
        {"dtype": "float16"},
        {"kv_dtype": "float8_e4m3"},
        {"head_size": 128},
        {"num_query_heads": 4},
        {"num_query_heads": 4, "num_kv_heads": 1},
        {"block_size": 32},
        {"query_lengths": (2, 1)},
        {"query_lengths": (1, 1, 1), "kv_lengths": (40, 100, 100)},
        {"kv_lengths": (40, 101)},
        {"kv_lengths": (40, 300)},
    ],
    ids=str,
)
def test_what_a_launch_depends_on_is_in_the_signature(changes):
    assert signature_of(call_of(**changes)) != signature_of(call_of())


def strided(call):
    wide = torch.empty(2, 10, 64, dtype=torch.bfloat16)
    return {
        "query strides": dataclasses.replace(call, query=wide[:, :8]),
        "output strides": dataclasses.replace(call, out=wide[:, :8]),
        "output type": dataclasses.replace(call, out=torch.empty(2, 8, 64)),
        "output alignment": dataclasses.replace(
            call, out=torch.empty(2 * 8 * 64 + 4, dtype=torch.bfloat16)[4:].view(2, 8, 64)
        ),
        "scale": dataclasses.replace(call, scale=0.5),
        "causality": dataclasses.replace(call, causal=False),
        "cache strides": dataclasses.replace(
            call,
            cache=dataclasses.replace(
                call.cache, key=call.cache.key.clone(), value=call.cache.value.clone()
            ),
        ),
        "likely length": dataclasses.replace(
            call, batch=dataclasses.replace(call.batch, likely_kv_length=50)
        ),
        "whether most is shared": dataclasses.replace(
            call, batch=dataclasses.replace(call.batch, likely_shared=True)
        ),
        "known lengths": dataclasses.replace(
            call,
            batch=dataclasses.replace(
                call.batch, known_lengths=KnownLengths.of(np.array([1, 40]), np.array([40, 100]))
            ),
        ),
        "counters": dataclasses.replace(
            call,
            batch=dataclasses.replace(
                call.batch, arrivals=torch.zeros(NUM_ARRIVALS, dtype=torch.int32)
            ),
        ),
        "table strides": dataclasses.replace(
            call,
            batch=dataclasses.replace(
                call.batch, block_tables=call.batch.block_tables.repeat(1, 2)[:, :10]
            ),
        ),
    }


@pytest.mark.parametrize("name", strided(call_of()))
def test_places_and_numbers_that_a_launch_depends_on_are_in_the_signature(name):
    assert signature_of(strided(call_of())[name]) != signature_of(call_of())


def test_what_is_shared_is_not_searched_for_where_no_plan_does():
    class Unsearched:
        @property
        def spares_half(self):
            raise AssertionError("it was searched for")

    call = call_of()
    call = dataclasses.replace(call, batch=dataclasses.replace(call.batch, sharing=Unsearched()))
    signature_of(dataclasses.replace(call, window=100))
    signature_of(dataclasses.replace(call, alibi_slopes=torch.ones(8)))
    with pytest.raises(AssertionError, match="searched for"):
        signature_of(call)


class Recorder:
    """In place of a kernel: keeps what it is launched with."""

    def launch(self, programs, threads, shared_bytes, parameters, cluster=1):
        del cluster
        self.launched = programs, threads, shared_bytes, parameters


MIXED = {"query_lengths": (1, 40), "kv_lengths": (4000, 100)}


@pytest.mark.parametrize(
    ("size", "splits", "is_beside"),
    [(NUM_ARRIVALS, 1, 1), (NUM_ARRIVALS, 2, 0), (2112, 1, 0), (1, 1, 0), (None, 1, 0)],
)
def test_a_second_launch_begins_beside_the_first_where_nothing_is_between(
    size, splits, is_beside, monkeypatch
):
    arrivals = None if size is None else torch.zeros(size, dtype=torch.int32)
    call = call_of(**MIXED)
    call = dataclasses.replace(call, batch=dataclasses.replace(call.batch, arrivals=arrivals))
    made = []

    def load(*args):
        made.append((dict(args[2]), Recorder()))
        return made[-1][1]

    for module in (decode, prefill, prefill_merge):
        monkeypatch.setattr(module, "load_kernel", load)
    for module in (decode, prefill):
        monkeypatch.setattr(module, "num_multiprocessors", lambda _: 132)
    for module in (decode_map, prefill_map):
        monkeypatch.setattr(module, "tensor_map", lambda *_: TensorMap())
    monkeypatch.setattr(prefill, "way_of", lambda *_, **__: Way(Cut(2, 128), splits, 1.0))
    shared_maps.cache_clear()
    MixedLaunch(call)(call)
    shared_maps.cache_clear()
    (long,) = ((macros, kernel) for macros, kernel in made if "BESIDE" in macros)
    (short,) = (kernel for macros, kernel in made if macros.get("AMONG_LONGER"))
    assert long[0]["BESIDE"] == is_beside
    short, long = (kernel.launched[-1] for kernel in (short, long[1]))
    if is_beside:
        most = 2 * 2 * 132 * decode.WARPS  # two programs a multiprocessor, two rows each
        assert short.arrived == arrivals.data_ptr()
        assert long.tickets >= short.arrived + 4 * most
        assert long.tickets + 8 <= short.arrived + 4 * size


KINDS = pytest.mark.parametrize("kind", [decode.DecodeLaunch, prefill.PrefillLaunch])


@pytest.fixture
def kernel(kind, monkeypatch):
    """A recorder, with the driver replaced; `described` has the addresses of described tensors."""
    module = sys.modules[kind.__module__]
    recorder = Recorder()
    recorder.described = []

    def describe(address, *_):
        recorder.described.append(address)
        return TensorMap((address,))

    monkeypatch.setattr(module, "load_kernel", lambda *_: recorder)
    monkeypatch.setattr(decode_map if module is decode else prefill_map, "tensor_map", describe)
    processors = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    shared_maps.cache_clear()
    yield recorder
    shared_maps.cache_clear()


@KINDS
def test_a_step_in_which_a_sequence_grows_describes_no_cache_again(kernel, kind):
    first = call_of()
    batch = dataclasses.replace(first.batch, max_kv_length=first.batch.max_kv_length + 1)
    grown = dataclasses.replace(first, batch=batch)
    assert signature_of(first) != signature_of(grown)
    kind(first)(first)
    before = list(kernel.described)
    assert {first.cache.key.data_ptr(), first.cache.value.data_ptr()} <= set(before)
    kind(grown)(grown)
    assert kernel.described == before


@KINDS
def test_a_launch_made_for_one_call_takes_the_addresses_of_another(kernel, kind):
    first, second = call_of(seed=0, lse=True, sinks=True), call_of(seed=1, lse=True, sinks=True)
    launch = kind(first)
    for call in (first, second):
        launch(call)
        *_, parameters = kernel.launched
        assert parameters.out == call.out.data_ptr()
        assert parameters.lse == call.lse.data_ptr()
        assert parameters.tables == call.batch.block_tables.data_ptr()
        assert parameters.kv_lengths == call.batch.kv_lengths.data_ptr()
        assert parameters.query_starts == call.batch.query_starts.data_ptr()
        assert parameters.sinks == call.sinks.data_ptr()
        assert parameters.alibi_slopes is None
        assert parameters.key.words[0] == call.cache.key.data_ptr()
        assert parameters.value.words[0] == call.cache.value.data_ptr()
        assert parameters.num_sequences == 2


@KINDS
def test_what_a_launch_makes_lives_until_it_is_launched(kernel, kind, monkeypatch):
    made, gone = [], []

    def noted(make):
        def noting(*args, **options):
            tensor = make(*args, **options)
            made.append(weakref.ref(tensor))
            return tensor

        return noting

    call = call_of()  # of a batch that keeps no counters, so that each launch has its own
    launch = kind(call)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, noted(getattr(torch, name)))
    monkeypatch.setattr(kernel, "launch", lambda *_: gone.append([ref() is None for ref in made]))
    launch(call)
    assert made
    assert gone == [[False] * len(made)]


def test_what_is_replaced_after_a_launch_is_in_the_next_signature():
    call = call_of(kv_dtype="float8_e4m3")
    first = signature_of(call)
    cache, batch = call.cache, call.batch
    longer = dataclasses.replace(batch, max_kv_length=batch.max_kv_length + 1)
    scaled = dataclasses.replace(cache, key_scale=None)
    fewer = dataclasses.replace(cache, key=cache.key[1:], value=cache.value[1:])
    for changes in ({"batch": longer}, {"cache": scaled}, {"cache": fewer}):
        assert signature_of(dataclasses.replace(call, **changes)) != first


@pytest.mark.parametrize("kv_length", [1, 16, 500, 512, 513, 3000])
@pytest.mark.parametrize("extra_columns", [0, 3, 500])
def test_lines_of_tables_end_with_the_longest_sequences_blocks_or_before_the_rows_end(
    kv_length, extra_columns
):
    shape = AttentionShape("small", (1, 1), (1, kv_length), **ROWS)
    call = make_inputs(shape, extra_columns=extra_columns).call()
    lines, blocks = table_lines_of(call), -(-kv_length // 16)
    width = call.batch.block_tables.shape[1]
    assert lines == 1 or 32 * lines <= width
    assert 32 * (lines - 1) < blocks  # no line has padding alone
    assert 32 * lines >= min(blocks, width // 32 * 32)
