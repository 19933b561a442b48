"""What the peers' adapters hand over, with the peers themselves replaced by PyTorch."""

import dataclasses
import gc
import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pagedattn.attention import AttentionCall, Launch, UnsupportedError
from pagedattn.attention.reference import reference_attention
from pagedattn.peers import PEERS, CudnnContiguous, SdpaContiguous
from pagedattn.peers.adapter import Adapter
from pagedattn.peers.flashinfer import FlashInferCascade, FlashInferFa2, FlashInferPersistent
from pagedattn.peers.flashinfer import common as flashinfer_common
from pagedattn.peers.flashinfer.cascade import shared_blocks
from pagedattn.peers.flashinfer.common import Csr, kept_with
from pagedattn.testing import check_attention, make_inputs
from pagedattn.workloads import AttentionShape

MIXED = ((1, 5, 1, 20), (7, 16, 33, 20))


def inputs_of(lengths=MIXED, **changes):
    return make_inputs(AttentionShape("small", *lengths, 4, 2, 64, 4, "float16"), **changes)


class Oracle(Adapter):
    """An adapter whose kernel is the oracle, which refuses strides as a kernel might."""

    name = "oracle"
    features = frozenset({"window", "lse"})

    def missing(self, _):
        return None

    def bind(self, call):
        assert call.query.is_contiguous()
        assert call.out.is_contiguous()

        def run():
            out, lse = reference_attention(call)
            call.out.copy_(out)
            if call.lse is not None:
                call.lse.copy_(lse)

        return Launch(run, call.out)


def test_a_kernel_that_takes_no_strides_gets_copies_and_its_result_goes_back():
    inputs = inputs_of()
    wide = torch.full((27, 6, 64), 7.0, dtype=torch.float16)
    query = torch.zeros(27, 8, 64, dtype=torch.float16)
    query[:, :4] = inputs.query
    strided = dataclasses.replace(inputs, query=query[:, :4])
    launch = Oracle().prepare(strided.call(out=wide[:, :4]))
    wide.fill_(7.0)
    query.mul_(0.5)  # a later launch reads what is there then
    check_attention(launch(), strided)
    assert (wide[:, 4:] == 7).all()


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (RuntimeError("a plan\nerror: no kernel for 80\nmore"), "RuntimeError: error: no kernel"),
        (AssertionError(), "it raised AssertionError"),
        (ValueError("/opt/site/a-b/prefill.cuh(551): no 1/2"), r": prefill.cuh\(551\): no 1/2"),
    ],
)
def test_what_a_peer_raises_is_a_phrase(error, phrase):
    def fail(_):
        raise error

    adapter = Oracle()
    adapter.bind = fail
    with pytest.raises(UnsupportedError, match=phrase):
        adapter.attention(inputs_of().call())


def test_what_a_plan_made_lives_as_long_as_the_wrapper():
    class Wrapper:
        def plan(self):
            self.indices = torch.arange(3)

    wrapper = Wrapper()
    kept = kept_with(wrapper)
    wrapper.plan()
    of_a_captured_launch = weakref.ref(wrapper.indices)
    kept.append(dict(vars(wrapper)))
    wrapper.plan()
    del kept
    gc.collect()
    assert of_a_captured_launch() is not None
    del wrapper
    gc.collect()
    assert of_a_captured_launch() is None


def test_a_wrong_call_of_a_peer_is_no_phrase():
    def fail(_):
        raise TypeError("unexpected keyword argument")

    adapter = Oracle()
    adapter.bind = fail
    with pytest.raises(TypeError):
        adapter.attention(inputs_of().call())


def test_features_and_dtypes_that_a_kernel_lacks_are_said():
    call = inputs_of().call()
    assert Oracle().unsupported(call) is None
    assert (
        Oracle().unsupported(dataclasses.replace(call, soft_cap=2.0)) == "it does not do a soft cap"
    )
    shape = AttentionShape("small", (1,), (7,), 4, 2, 64, 4, "float32")
    assert "float16 and bfloat16, not float32" in Oracle().unsupported(make_inputs(shape).call())
    assert CudnnContiguous().unsupported(call) == "cuDNN needs a CUDA GPU"
    assert "differ in length" in SdpaContiguous().unsupported(call)


@pytest.mark.parametrize(
    "lengths", [((1,) * 3, (9,) * 3), ((9,) * 3, (9,) * 3), ((4,) * 2, (9,) * 2)]
)
def test_contiguous_attention_is_right_and_writes_its_result_after_the_launch(lengths):
    inputs = inputs_of(lengths)
    call = inputs.call()
    launch = SdpaContiguous().prepare(call)
    call.out.fill_(torch.nan)
    launch.run()
    assert call.out.isnan().all()
    check_attention(launch(), inputs)


def test_flashinfer_s_page_table_names_each_sequence_s_blocks_in_order():
    inputs = inputs_of()
    table = Csr.of(inputs.call())
    tables = inputs.batch.block_tables.tolist()
    assert table.indptr.tolist() == [0, 2, 6, 15, 20]
    assert table.indices.tolist() == [
        *tables[0][:2],
        *tables[1][:4],
        *tables[2][:9],
        *tables[3][:5],
    ]
    assert table.last.tolist() == [3, 4, 1, 4]
    assert table.query_starts.tolist() == [0, 1, 6, 7, 27]


def test_blocks_that_have_left_the_window_are_named_by_the_first_that_is_seen():
    inputs = inputs_of(window=6)
    table = Csr.of(inputs.call())
    # the third sequence's query is token 32 and sees 27 to 32, the blocks 6 to 8
    row = inputs.batch.block_tables[2].tolist()
    assert table.indices.tolist()[6:15] == [row[6]] * 7 + row[7:9]
    assert table.indptr.tolist() == [0, 2, 6, 15, 20]


def test_an_empty_sequence_has_no_blocks():
    inputs = inputs_of()
    inputs.batch.kv_lengths[1] = 0
    table = Csr.of(inputs.call())
    assert table.indptr.tolist() == [0, 2, 2, 11, 16]
    assert table.last.tolist() == [3, 0, 1, 4]


@pytest.mark.parametrize(("shared", "blocks"), [(0, 0), (4, 1), (8, 2)])
def test_blocks_are_shared_up_to_the_first_that_a_query_s_own_token_is_in(shared, blocks):
    shape = AttentionShape("small", (1, 3), (13, 12), 4, 2, 64, 4, "float16", shared_prefix=shared)
    call = make_inputs(shape).call()
    assert shared_blocks(call) == blocks
    call.batch.block_tables[1] = call.batch.block_tables[0]
    assert shared_blocks(call) == 2


class PagedWrapper:
    """FlashInfer's prefill wrapper as its documentation has it, by the oracle."""

    def __init__(self, workspace, layout="NHD", backend="auto"):
        assert layout == "HND"
        self.workspace, self.backend = workspace, backend

    def plan(
        self, query_starts, indptr, indices, last, heads, kv_heads, head_size, block_size, *,
        causal, pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, sm_scale=None,
        q_data_type=None, kv_data_type=None, o_data_type=None,
    ):  # fmt: skip
        self.plan_of = vars().copy()

    def run(self, query, cache, *, out=None, lse=None, return_lse=False):
        planned, key = SimpleNamespace(**self.plan_of), cache[0]
        lengths = planned.indptr.diff()
        width = int(lengths.max())
        tables = torch.zeros(len(lengths), width, dtype=torch.int32)
        used = torch.arange(width) < lengths[:, None]
        tables[used] = planned.indices
        tokens = (lengths - 1).clamp(min=0) * planned.block_size + planned.last
        made = inputs_of()
        batch = dataclasses.replace(
            made.batch,
            block_tables=tables,
            kv_lengths=tokens.int(),
            query_starts=planned.query_starts,
            slots=torch.zeros(len(query), dtype=torch.int64),
        )
        call = AttentionCall(
            query,
            dataclasses.replace(made.cache, key=key, value=cache[1]),
            batch,
            planned.sm_scale,
            torch.empty_like(query),
            window=None if planned.window_left < 0 else planned.window_left + 1,
            soft_cap=planned.logits_soft_cap,
        )
        result, exact_lse = reference_attention(call)
        (out if out is not None else call.out).copy_(result)
        if lse is not None:
            lse.copy_(exact_lse / flashinfer_common.LN_2)
        return call.out if out is None else out


@pytest.fixture
def flashinfer(monkeypatch):
    """A module in the place of FlashInfer, on the CPU."""
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = PagedWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_common, "WORKSPACE_BYTES", 8)
    monkeypatch.setattr(flashinfer_common.FlashInferKernel, "missing", lambda *_: None)
    return module


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"soft_cap": 2.0}], ids=str)
def test_flashinfer_s_prefill_gets_tables_lengths_and_options(flashinfer, options):
    del flashinfer
    inputs = inputs_of(**options)
    lse = torch.empty(27, 4)
    call = inputs.call(lse=lse)
    assert FlashInferFa2().unsupported(call) is None
    launch = FlashInferFa2().prepare(call)
    check_attention(launch(), inputs)
    _, exact = reference_attention(inputs.call(), torch.float64)
    assert torch.allclose(lse.double(), exact, atol=1e-4)  # natural, where FlashInfer's is not
    launch.plan()
    check_attention(launch(), inputs)


def test_the_others_of_flashinfer_refuse_what_they_have_no_kernel_for(flashinfer):
    del flashinfer
    call = inputs_of(window=6).call()
    assert FlashInferPersistent().unsupported(call) == "it does not do a sliding window"
    assert FlashInferCascade().unsupported(inputs_of().call()) == "the sequences share no blocks"


def test_every_peer_has_its_own_name():
    assert len(set(PEERS)) == len(PEERS)
