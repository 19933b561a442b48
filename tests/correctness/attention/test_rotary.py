"""Turning Q and K and writing K and V in one go gives what complex numbers in float64 give."""

import math

import pytest
import torch

from pagedattn import KVCache
from pagedattn.attention import (
    Rotary,
    get_implementation,
    register,
    registry,
    rotary_write_kv,
    rotate,
)
from pagedattn.attention.torch_impl import TorchImplementation
from pagedattn.kv_cache import FP8

pytestmark = pytest.mark.implementations("reference", "torch", "triton")

NUM_POSITIONS = 300
PAIRS_LIE = {"halves": False, "interleaved": True}


@pytest.fixture(autouse=True)
def _triton_can_run(request):
    case = getattr(request.node, "callspec", None)
    if case is not None and case.params.get("implementation") == "triton":
        pytest.importorskip("triton")
        if case.params["device"] == "cpu" and torch.cuda.is_available():
            pytest.skip("beside a GPU, Triton compiles for it and does not interpret")


def rotary_of(size, device, *, interleaved=False, dtype=torch.float32):
    rates = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    made = Rotary.of(rates.to(device), NUM_POSITIONS, interleaved=interleaved)
    return Rotary(made.cos_sin.to(dtype), interleaved)


def exact(heads, positions, rotary):
    """Multiply each pair, as a complex number, by that of its angle."""
    heads, table = heads.double().cpu(), rotary.cos_sin.double().cpu()
    size = rotary.rotary_size
    first, second = torch.arange(size).view(2, -1)
    if rotary.interleaved:
        first, second = torch.arange(size).view(-1, 2).T
    out = heads.clone()
    for token, position in enumerate(positions.tolist()):
        factors = torch.complex(*table[position].view(2, -1))
        turned = torch.complex(heads[token, :, first], heads[token, :, second]) * factors
        out[token, :, first], out[token, :, second] = turned.real, turned.imag
    return out


def close(result, expected, dtype, *, interpreted=False):
    """Whether each number is off by no more than two float32 products and rounding to `dtype`.

    Triton's interpreter cuts bfloat16 off where a GPU rounds.
    """
    eps = torch.finfo(dtype).eps
    if not (interpreted and dtype == torch.bfloat16):
        eps /= 2
    products = 4 * torch.finfo(torch.float32).eps * expected.abs().amax(-1, keepdim=True)
    wrong = (result.double().cpu() - expected).abs() > eps * expected.abs() + products
    return not wrong.any()


def made(device, dtype, num_tokens, num_query_heads, num_kv_heads, head_size, block_size=4):
    cache = KVCache(
        num_layers=2, num_blocks=-(-2 * num_tokens // block_size) + 1, block_size=block_size,
        num_kv_heads=num_kv_heads, head_size=head_size, dtype=dtype, device=device,
    )  # fmt: skip
    cache.storage.fill_(torch.nan)
    query = torch.randn((num_tokens, num_query_heads, head_size), device=device).to(dtype)
    key, value = torch.randn((2, num_tokens, num_kv_heads, head_size), device=device).to(dtype)
    slots = torch.randperm(cache.layer(1).num_slots, device=device)[:num_tokens]
    positions = torch.randint(0, NUM_POSITIONS, (num_tokens,), device=device)
    return cache, query, key, value, slots, positions


@pytest.mark.pairs(
    dtype=[torch.float16, torch.bfloat16, torch.float32],
    interleaved=PAIRS_LIE,
    sizes=[  # query heads, KV heads, head size, rotary size
        (4, 2, 64, 64),
        (1, 1, 64, 32),
        (9, 3, 80, 20),
        (6, 2, 24, 24),
        (8, 1, 96, 96),
        (32, 8, 128, 128),
        (5, 5, 192, 64),
        (20, 4, 256, 256),
    ],
)
def test_q_is_turned_and_k_and_v_land_in_their_slots(
    implementation, device, dtype, interleaved, sizes
):
    num_query_heads, num_kv_heads, head_size, rotary_size = sizes
    torch.manual_seed(head_size)
    cache, query, key, value, slots, positions = made(
        device, dtype, 5, num_query_heads, num_kv_heads, head_size
    )
    rotary = rotary_of(rotary_size, device, interleaved=interleaved)
    given = [tensor.clone() for tensor in (query, key, value)]
    layer = cache.layer(1)
    out = torch.full_like(query, torch.nan)
    got = rotary_write_kv(
        query, key, value, layer, slots, positions, rotary, out=out, implementation=implementation
    )
    assert got is out
    interpreted = device == "cpu" and implementation in ("triton", "cuda-emulated")
    assert close(out, exact(query, positions, rotary), dtype, interpreted=interpreted)
    blocks, offsets = slots // 4, slots % 4
    written = layer.key[blocks, :, offsets]
    assert close(written, exact(key, positions, rotary), dtype, interpreted=interpreted)
    assert torch.equal(layer.value[blocks, :, offsets], value)
    assert torch.equal(out[..., rotary_size:], query[..., rotary_size:])
    assert int((~cache.storage.isnan()).sum()) == key.numel() + value.numel()
    for tensor, before in zip((query, key, value), given, strict=True):
        assert torch.equal(tensor, before)


def test_an_output_that_begins_where_the_query_does_is_the_query():
    cache, query, key, value, slots, positions = made("cpu", torch.float32, 3, 2, 2, 64)
    arguments = key, value, cache.layer(0), slots, positions, rotary_of(32, "cpu")
    room = torch.zeros(3 * 4 * 64)
    apart = room.as_strided((3, 2, 64), (256, 64, 1))
    with pytest.raises(ValueError, match=r"out begins where query does, .*; it must be query itse"):
        rotary_write_kv(room.as_strided((3, 2, 64), (128, 64, 1)), *arguments, out=apart)
    none = query[:0], *(tensor[:0] for tensor in (key, value))
    out = torch.empty(0, 4, 64)[:, :2]
    assert (
        rotary_write_kv(*none, cache.layer(0), slots[:0], positions[:0], arguments[-1], out=out)
        is out
    )


def test_an_implementation_that_writes_in_its_own_way_does_so_after_turning(monkeypatch):
    cache, query, key, value, slots, positions = made("cpu", torch.float16, 3, 2, 2, 64)
    written = []

    class Mine(TorchImplementation):
        name = "mine"

        def write_kv(self, key, value, cache, slots):
            written.append(key.dtype)
            super().write_kv(key, value, cache, slots)

    monkeypatch.setattr(registry, "_made", {"mine": Mine()})
    rotary_write_kv(
        query, key, value, cache.layer(0), slots, positions, rotary_of(64, "cpu"),
        implementation="mine",
    )  # fmt: skip
    assert written == [torch.float32]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_size", [64, 32])
def test_q_may_be_turned_in_place_and_all_may_be_parts_of_a_fused_projection(
    implementation, device, interleaved, rotary_size
):
    cache, _, _, _, slots, positions = made(device, torch.float16, 7, 4, 2, 64)
    rotary = rotary_of(rotary_size, device, interleaved=interleaved)
    fused = torch.randn((7, 8, 64), device=device).half()  # 4 query, 2 key, 2 value heads
    before = fused.clone()
    query, key, value = fused.split([4, 2, 2], dim=1)
    layer = cache.layer(0)
    got = rotary_write_kv(
        query, key, value, layer, slots, positions.int(), rotary, out=query,
        implementation=implementation,
    )  # fmt: skip
    assert got is query
    assert close(fused[:, :4], exact(before[:, :4], positions, rotary), torch.float16)
    assert torch.equal(fused[:, 4:], before[:, 4:])
    blocks, offsets = slots // 4, slots % 4
    expected = exact(before[:, 4:6], positions, rotary)
    assert close(layer.key[blocks, :, offsets], expected, torch.float16)
    assert torch.equal(layer.value[blocks, :, offsets], before[:, 6:])


@pytest.mark.parametrize("table", [torch.float16, torch.bfloat16], ids=str)
def test_the_table_may_be_16_bits_wide(implementation, device, table):
    cache, query, key, value, slots, positions = made(device, torch.float16, 3, 2, 2, 64)
    rotary = rotary_of(64, device, dtype=table)
    out = rotary_write_kv(
        query, key, value, cache.layer(0), slots, positions, rotary, implementation=implementation
    )
    assert close(out, exact(query, positions, rotary), torch.float16)


@pytest.mark.pairs(
    dtype=[torch.float16, torch.float32], interleaved=PAIRS_LIE, rotary_size=[64, 24]
)
def test_an_fp8_cache_gets_turned_keys_in_its_scales(
    implementation, device, dtype, interleaved, rotary_size
):
    _, query, key, value, slots, positions = made(device, dtype, 6, 4, 3, 64)
    cache = made(device, FP8, 6, 4, 3, 64)[0]
    scales = (torch.rand((2, 3)) + 0.01).to(device)
    cache.scales[1] = scales
    layer = cache.layer(1)
    rotary = rotary_of(rotary_size, device, interleaved=interleaved)
    rotary_write_kv(
        query, key, value, layer, slots, positions, rotary, implementation=implementation
    )
    # what the elements mean is off by half of fp8's spacing, 2^-4 or 2^-10 of the scale, and by
    # what K in its own dtype is, where it is turned in a step of its own
    exact_key = exact(key, positions, rotary)
    for part, wanted, scale in ((layer.key, exact_key, scales[0]), (layer.value, value, scales[1])):
        wanted, scale = wanted.double().cpu(), scale.double().cpu()[:, None]
        got = part[slots // 4, :, slots % 4].cpu().double() * scale
        bounded = wanted.clamp(-448 * scale, 448 * scale)
        spacing = bounded.abs() / 16 + scale / 1024
        assert ((got - bounded).abs() <= spacing * (1 + 1e-5) + 1e-3 * bounded.abs()).all()
    written = (~cache.storage.float().isnan()).sum()
    assert int(written) == key.numel() + value.numel()


def test_slots_outside_the_cache_are_not_written_and_their_q_is_turned(implementation, device):
    cache, query, key, value, slots, positions = made(device, torch.float16, 4, 2, 2, 64)
    layer = cache.layer(0)
    slots[:3] = torch.tensor([-1, layer.num_slots, 2**40])
    rotary = rotary_of(64, device)
    out = rotary_write_kv(
        query, key, value, layer, slots, positions, rotary, implementation=implementation
    )
    assert close(out, exact(query, positions, rotary), torch.float16)
    assert int((~cache.storage.isnan()).sum()) == 2 * 2 * 64


def test_a_position_that_the_table_does_not_have_makes_nan_of_q_and_k(implementation, device):
    cache, query, key, value, slots, positions = made(device, torch.float16, 3, 2, 2, 64)
    positions[:2] = torch.tensor([-1, NUM_POSITIONS])
    layer = cache.layer(0)
    out = rotary_write_kv(
        query, key, value, layer, slots, positions, rotary_of(32, device),
        implementation=implementation,
    )  # fmt: skip
    assert out[:2, :, :32].isnan().all()
    assert not out[:2, :, 32:].isnan().any()
    assert not out[2].isnan().any()
    written = layer.key[slots // 4, :, slots % 4]
    assert written[:2, :, :32].isnan().all()
    assert not written[2].isnan().any()
    assert torch.equal(layer.value[slots // 4, :, slots % 4], value)


def test_no_tokens_write_nothing(implementation, device):
    cache, query, key, value, slots, positions = made(device, torch.float16, 1, 2, 2, 64)
    out = rotary_write_kv(
        query[:0], key[:0], value[:0], cache.layer(0), slots[:0], positions[:0],
        rotary_of(64, device), implementation=implementation,
    )  # fmt: skip
    assert out.shape == (0, 2, 64)
    assert cache.storage.isnan().all()


def test_an_implementation_that_only_writes_gets_a_turned_key(monkeypatch):
    monkeypatch.setattr(registry, "_made", dict(registry._made))
    seen = []

    class Plain:
        name = "plain"

        def write_kv(self, key, value, cache, slots):
            seen.append((key, value))
            get_implementation("torch").write_kv(key, value, cache, slots)

    register(Plain())
    cache, query, key, value, slots, positions = made("cpu", torch.float16, 3, 2, 2, 64)
    rotary = rotary_of(64, "cpu")
    out = rotary_write_kv(
        query, key, value, cache.layer(0), slots, positions, rotary, implementation="plain"
    )
    assert torch.equal(seen[0][0], rotate(key, positions, rotary).half())
    assert seen[0][1] is value
    assert torch.equal(out, rotate(query, positions, rotary).half())


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_scores_depend_on_the_distance_alone(interleaved):
    rotary = rotary_of(64, "cpu", interleaved=interleaved)
    query, key = torch.randn(2, 1, 1, 64)
    scores = [
        (rotate(query, torch.tensor([at]), rotary) * rotate(key, torch.tensor([at - 7]), rotary))
        .sum().item()
        for at in (7, 50, 299)
    ]  # fmt: skip
    assert max(scores) - min(scores) < 1e-4 * math.sqrt(64)


def test_llama_turns_as_transformers_does():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64 * 4, num_attention_heads=4, head_dim=64)
    embedding = LlamaRotaryEmbedding(config)
    query, key = torch.randn(2, 11, 4, 64)
    positions = torch.randint(0, NUM_POSITIONS, (11,))
    cos, sin = embedding(query, positions[None])
    theirs = apply_rotary_pos_emb(query[None].transpose(1, 2), key[None].transpose(1, 2), cos, sin)
    rotary = Rotary.of(embedding.inv_freq, NUM_POSITIONS)
    for mine, other in zip((query, key), theirs, strict=True):
        torch.testing.assert_close(
            rotate(mine, positions, rotary), other[0].transpose(0, 1), rtol=1e-6, atol=1e-6
        )


def test_gpt_j_turns_as_transformers_does():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.gptj import modeling_gptj

    heads = torch.randn(11, 4, 64)
    positions = torch.randint(0, NUM_POSITIONS, (11,))
    rotary = rotary_of(32, "cpu", interleaved=True)
    cos, sin = rotary.cos_sin[positions].chunk(2, dim=-1)
    turned = modeling_gptj.apply_rotary_pos_emb(heads[None, ..., :32], sin[None], cos[None])
    got = rotate(heads, positions, rotary)
    torch.testing.assert_close(got[..., :32], turned[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(got[..., 32:], heads[..., 32:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": torch.zeros(3, 2, 32)}, r"query is torch.float32 \(3, 2, 32\); it must be"),
        ({"query": torch.zeros(2, 2, 64)}, r"\[num_tokens, num_query_heads, head_size\], here \[3"),
        ({"query": torch.zeros(3, 2, 64).long()}, "query is torch.int64"),
        ({"query": torch.zeros(3, 0, 64)}, r"query is torch.float32 \(3, 0, 64\)"),
        ({"query": torch.zeros(3, 64, 2).transpose(1, 2)}, "query must be contiguous in its last"),
        ({"key": torch.zeros(3, 1, 64)}, "key has shape"),
        ({"key": torch.zeros(3, 2, 64).double()}, "key is torch.float64; it must be float16"),
        ({"positions": torch.zeros(2).long()}, r"positions are torch.int64 \(2,\); they must be"),
        ({"positions": torch.zeros(3)}, "positions are torch.float32"),
        ({"slots": torch.zeros(3).int()}, "slots are torch.int32"),
        ({"rotary": rotary_of(66, "cpu")}, "the rotary size is 66; the heads have 64 elements"),
        ({"out": torch.zeros(3, 2, 64).half()}, "out is torch.float16"),
        ({"out": torch.zeros(1, 2, 64).expand(3, 2, 64)}, "and several rows in one place"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_that_do_not_fit_are_refused_and_nothing_is_written(change, sentence):
    cache, query, key, value, slots, positions = made("cpu", torch.float32, 3, 2, 2, 64)
    arguments = {
        "query": query, "key": key, "value": value, "cache": cache.layer(0), "slots": slots,
        "positions": positions, "rotary": rotary_of(64, "cpu"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        rotary_write_kv(**arguments | change)
    assert cache.storage.isnan().all()


@pytest.mark.parametrize(
    "table",
    [torch.zeros(5), torch.zeros(5, 3), torch.zeros(5, 4).long(), torch.zeros(0, 4),
     torch.zeros(4, 6).T[:, ::2]],
    ids=["one dimension", "odd", "integers", "empty", "strided"],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(table):
    with pytest.raises(ValueError, match=r"cos_sin is .*; it must be"):
        Rotary(table)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_a_captured_write_follows_slots_and_positions_updated_in_place(interleaved):
    cache, query, key, value, slots, positions = made("cuda", torch.bfloat16, 9, 8, 2, 128)
    rotary, layer = rotary_of(128, "cuda", interleaved=interleaved), cache.layer(0)
    out = torch.empty_like(query)
    arguments = (query, key, value, layer, slots, positions, rotary)
    rotary_write_kv(*arguments, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotary_write_kv(*arguments, out=out)
    for _ in range(4):
        for tensor in (query, key, value):
            tensor.normal_()
        slots.copy_(torch.randperm(layer.num_slots, device="cuda")[:9])
        positions.random_(0, NUM_POSITIONS)
        out.fill_(torch.nan)
        graph.replay()
        assert close(out, exact(query, positions, rotary), torch.bfloat16)
        written = layer.key[slots // 4, :, slots % 4]
        assert close(written, exact(key, positions, rotary), torch.bfloat16)
        assert torch.equal(layer.value[slots // 4, :, slots % 4], value)
