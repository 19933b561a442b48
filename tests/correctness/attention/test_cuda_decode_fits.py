"""Which GPU's fit decode is divided by, and what an H200's changes."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from pagedattn.attention.cuda import (
    decode,
    decode_calls,
    decode_config,
    decode_division,
    decode_map,
    prefill_map,
)
from pagedattn.attention.cuda.decode_fits import H100, H200, fit_for
from pagedattn.attention.cuda.module import TensorMap, memory_rate
from pagedattn.testing.emulator import unavailable

from .emulated import check, inputs_of

EITHER = pytest.mark.parametrize("fit", [H100, H200], ids=["H100", "H200"])
MEMORIES = {  # kHz and bits, as the driver tells them
    "H100 SXM": (2_619_000, 5120, H100),
    "H100 PCIe": (1_593_000, 5120, H100),
    "H100 NVL": (2_619_000, 6016, H100),
    "GH200 with HBM3": (2_619_000, 6144, H100),
    "H200": (3_201_000, 6016, H200),
    "GH200 with HBM3e": (3_201_000, 6144, H200),
    "unknown": (0, 0, H100),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_the_fit_is_of_the_gpu_whose_memory_is_most_alike(name, monkeypatch):
    clock, bus, fit = MEMORIES[name]
    told = SimpleNamespace(memory_clock_rate=clock, memory_bus_width=bus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    device = torch.device("cuda", 0)
    assert memory_rate(device) == pytest.approx(2 * clock * 1e3 * bus / 8)
    if name in ("H100 SXM", "H200"):
        assert memory_rate(device) == pytest.approx(fit.memory_rate, rel=1e-3)
    assert fit_for.__wrapped__(device) is fit


def test_what_is_no_gpu_is_an_h100_and_what_an_older_pytorch_does_not_tell(monkeypatch):
    assert fit_for(torch.device("cpu")) is H100
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert fit_for.__wrapped__(torch.device("cuda", 0)) is H100


@EITHER
@pytest.mark.parametrize("options", [{}, {"head_size": 80}, {"fp8": True}], ids=str)
def test_the_l2_fetches_as_much_at_once_as_its_gpu_was_measured_with(fit, options, monkeypatch):
    asked = []

    def note(*words):
        asked.append(words[-1])
        return TensorMap()

    for module in (decode_map, prefill_map):
        monkeypatch.setattr(module, "tensor_map", note)
        monkeypatch.setattr(module, "fit_for", lambda _: fit)
    inputs = inputs_of((40,), 40, **options)
    decode_map.map_of(inputs.cache.key, 32)
    prefill_map.map_of_queries(inputs.query, (32, 4, 4))
    for fp8_products in (False, True):
        prefill_map.map_of(inputs.cache.key, (128, fp8_products))
    assert asked == [{H100: 256, H200: 128}[fit]] * 4


def test_a_fit_reads_most_of_what_its_memory_is_made_for():
    for fit in (H100, H200):
        assert 0.9 * fit.memory_rate < fit.read_rate < fit.memory_rate


def test_a_memory_that_gives_more_is_read_by_more_programs_and_smaller_tiles():
    for kind in (
        (128, 2, 4, 16),
        (64, 2, 8, 16),
        (128, 1, 8, 16),
        (128, 2, 8, 1),
        (128, 2, 32, 16),
    ):
        of_h100, of_h200 = (decode_division.RowKind.of(*kind, fit=fit) for fit in (H100, H200))
        assert of_h200.full_rate > of_h100.full_rate
        assert of_h200.fewer_cost >= of_h100.fewer_cost
    tiles = [decode_config.choose_config(128, 2, 4, fit=fit).tile for fit in (H100, H200)]
    assert tiles == [64, 32]


def test_long_rows_go_to_clusters_where_their_programs_read_fast():
    slow = dataclasses.replace(H200, clustered_rate=H100.clustered_rate)
    for fit, expected in ((H200, (2, 2)), (slow, (1, 0)), (H100, (2, 2))):
        kind = decode_division.RowKind.of(128, 2, 4, 16, fit=fit)
        found = decode_division.clusters_of(8, 8, 132, 8192, 4 << 20, kind)
        assert found == expected


@EITHER
@pytest.mark.parametrize(
    ("num_sequences", "kv_length", "head_size", "block_size", "expected"),
    [
        (1, 128, 128, 16, (1, 0)),
        (1, 160, 128, 16, (4, 4)),
        (1, 160, 64, 16, (4, 4)),
        (1, 128, 128, 1, (5, 5)),
        # 16 rows of 4 programs would share paths, and all of them begin later
        (2, 160, 128, 16, (2, 2)),
        (8, 256, 128, 16, (1, 0)),
        (8, 256, 128, 1, (2, 2)),
        # cut for all programs into few parts, which are swapped by twos
        (5, 1432, 128, 16, (1, 0)),
    ],
)
def test_short_rows_go_to_clusters_where_one_program_would_ask_for_their_tokens_for_longer(
    fit, num_sequences, kv_length, head_size, block_size, expected
):
    kind = decode_division.RowKind.of(head_size, 2, 4, block_size, fit=fit)
    row_bytes = 4 * head_size * kv_length
    found = decode_division.clusters_of(num_sequences, 8, 132, kv_length, row_bytes, kind)
    assert found == expected


def test_half_of_the_programs_have_all_rows_only_where_they_read_all_there_is():
    for fit, halves in ((H100, True), (H200, False)):
        kind = decode_division.RowKind.of(64, 2, 3, 16, fit=fit)
        whole = decode_division.WholeRows.of(64, 3, 44, 132, 2048, kind)
        assert kind.halves is halves
        assert (whole.of_range == 3) is halves


BATCHES = {
    "d128, cut": ((700, 700, 700), (8, 2), 128),
    "d128, ragged": ((500, 33, 1), (8, 2), 128),
    "d80": ((300,) * 2, (4, 4), 80),
}


@pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")
@pytest.mark.parametrize("batch", BATCHES)
def test_decode_as_it_is_cut_for_an_h200_gives_what_attention_gives(batch):
    kv_lengths, heads, head_size = BATCHES[batch]
    configs = []

    def launch_of(call):
        launch = decode.DecodeLaunch(call)
        configs.append(launch.config)
        return launch

    def fit_of(device):
        del device
        return H200

    with mock.patch.object(decode_calls, "fit_for", fit_of):
        check(inputs_of(kv_lengths, heads=heads, head_size=head_size), launch_of, multiprocessors=7)
    assert (configs[0].tile, configs[0].stages) == (32 if head_size == 128 else 64, 8)
