"""Model and cache configurations: what is read, and what is refused with which sentence."""

import dataclasses
import json

import numpy as np
import pytest

from pagedattn.config import CacheConfig, ConfigError, ModelConfig, preset_names

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
QWEN3_0_6B = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 1024,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_positions": 1024,
    "n_ctx": 1024,
}


def assert_one_sentence(error, *parts):
    message = str(error.value)
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def without_name(model):
    return dataclasses.replace(model, name="any", num_parameters=None)


def test_a_llama_config_is_read_key_by_key():
    model = ModelConfig.from_hf(LLAMA)
    assert model == ModelConfig("llama", 32, 32, 8, 128, 4096, 8192, "bfloat16", None)
    assert model.num_queries_per_kv == 4


def test_the_head_size_is_head_dim_and_not_hidden_size_over_heads():
    model = ModelConfig.from_hf(QWEN3_0_6B)
    assert (model.head_size, model.hidden_size, model.num_query_heads) == (128, 1024, 16)
    assert without_name(model) == without_name(ModelConfig.preset("qwen3-0.6b"))


def test_gpt2_has_its_own_key_names():
    assert without_name(ModelConfig.from_hf(GPT2)) == without_name(ModelConfig.preset("gpt2"))


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads"])
def test_null_means_absent(key):
    absent = {name: value for name, value in LLAMA.items() if name != key}
    assert ModelConfig.from_hf(LLAMA | {key: None}) == ModelConfig.from_hf(absent)


def test_without_kv_heads_attention_is_multi_head():
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert ModelConfig.from_hf(config).num_kv_heads == 32


def test_a_nested_text_config_is_used_and_the_outer_dtype_with_it():
    text = {key: value for key, value in QWEN3_0_6B.items() if key != "torch_dtype"}
    outer = {"text_config": text, "hidden_size": 7, "dtype": "float16", "model_type": "vl"}
    model = ModelConfig.from_hf(outer)
    assert (model.hidden_size, model.dtype, model.name) == (1024, "float16", "vl")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_dtype_keys_are_read(key):
    config = {name: value for name, value in LLAMA.items() if name != "torch_dtype"}
    assert ModelConfig.from_hf(config | {key: "float16"}).dtype == "float16"
    assert ModelConfig.from_hf(config).dtype == "float32"


@pytest.mark.parametrize(
    ("extra", "num_kv_heads"),
    [
        ({"multi_query": True}, 1),
        ({"multi_query": False}, 32),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 4}, 4),
        ({"attn_config": {"kv_n_heads": 2}}, 2),
    ],
    ids=["falcon-7b", "falcon-rw", "falcon-40b", "dbrx"],
)
def test_other_ways_to_say_kv_heads_are_honoured(extra, num_kv_heads):
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert ModelConfig.from_hf(config | extra).num_kv_heads == num_kv_heads


def test_a_path_a_string_and_a_folder_give_the_same_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    assert ModelConfig.from_hf(path) == ModelConfig.from_hf(LLAMA)
    assert ModelConfig.from_hf(str(path)) == ModelConfig.from_hf(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(tmp_path)
    assert_one_sentence(error, str(tmp_path / "config.json"), "No such file")


@pytest.mark.parametrize("content", [b'{"n_layer": 12', b"", b"\xff\xfe{}", b"[1]", b"null"])
def test_a_file_without_a_json_object_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(path)
    assert_one_sentence(error, str(path), "must hold")


def test_a_source_that_is_neither_mapping_nor_path_is_refused():
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(7)
    assert_one_sentence(error, "source must be", "not 7")


@pytest.mark.parametrize(
    "key",
    ["num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"],
)
def test_a_missing_key_is_named(key):
    config = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(config)
    assert_one_sentence(error, key, "positive integer")


@pytest.mark.parametrize("value", [True, "32", 32.0, 0, -8, [32]], ids=repr)
@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_size",
        "max_position_embeddings",
    ],
)
def test_a_count_that_is_no_positive_integer_is_refused_with_its_key(key, value):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(LLAMA | {key: value})
    assert_one_sentence(error, f"{key} must be a positive integer", f"not {value!r}")


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"num_key_value_heads": 5}, ("num_attention_heads", "num_key_value_heads", "32", "5")),
        ({"num_key_value_heads": 64}, ("num_key_value_heads", "64")),
        ({"hidden_size": 4100}, ("hidden_size", "4100", "num_attention_heads", "32", "head_dim")),
        ({"torch_dtype": "int8"}, ("torch_dtype", "'int8'", "float16, bfloat16, float32")),
        ({"torch_dtype": 16}, ("torch_dtype", "16")),
        ({"dtype": "float8_e4m3"}, ("dtype", "'float8_e4m3'")),
        ({"text_config": [1]}, ("text_config", "[1]")),
        ({"multi_query": "yes"}, ("multi_query", "'yes'")),
        ({"kv_lora_rank": 512}, ("kv_lora_rank", "512")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_refused_with_what_was_given(extra, parts):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(LLAMA | extra)
    assert_one_sentence(error, *parts)


def test_a_hidden_size_that_heads_do_not_divide_is_allowed_with_a_head_dim():
    assert ModelConfig.from_hf(LLAMA | {"hidden_size": 4100, "head_dim": 96}).head_size == 96


def test_a_model_config_checks_itself_too():
    good = ModelConfig.preset("llama-3-8b")
    for change, part in [
        ({"num_layers": True}, "num_layers"),
        ({"head_size": 0}, "head_size"),
        ({"num_kv_heads": 5}, "num_query_heads must be a multiple of num_kv_heads"),
        ({"dtype": "float64"}, "dtype"),
        ({"name": ""}, "name"),
        ({"layer_types": ("full_attention",)}, "num_layers = 32"),
        ({"layer_types": ("without_kv",) * 32}, "keeps K and V"),
        ({"layer_types": ("linear_attention",) * 32}, "layer_types must be one of"),
        ({"layer_types": ("sliding_attention",) * 32}, "sliding_window"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer"),
        ({"num_weight_bytes": -1}, "num_weight_bytes"),
        ({"num_parameters": 1.5}, "num_parameters"),
    ]:
        with pytest.raises(ConfigError) as error:
            dataclasses.replace(good, **change)
        assert_one_sentence(error, part)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.preset("gpt2").num_layers = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        CacheConfig(16, 1, "float16").block_size = 1


def test_an_unknown_preset_names_the_known_ones():
    for name in ("gpt-5", None):
        with pytest.raises(ConfigError) as error:
            ModelConfig.preset(name)
        assert_one_sentence(error, repr(name), *preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_its_own_name(name):
    assert ModelConfig.preset(name).name == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("facebook/opt-125m", "opt-125m"),
        ("Facebook/OPT-13B", "opt-13b"),
        ("OPT-66B", "opt-66b"),
        ("meta-llama/Meta-Llama-3-70B", "llama-3-70b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
    ],
)
def test_a_hub_id_is_a_preset_in_any_case(alias, name):
    assert ModelConfig.preset(alias) is ModelConfig.preset(name)


def opt_like(model, *, vocab, positions):
    """Weights of an OPT or GPT-2: a 4 x wide MLP, biases, two norms a layer and one at the end."""
    h = model.hidden_size
    return model.num_layers * (12 * h * h + 13 * h) + (vocab + positions) * h + 2 * h


def llama_like(model, *, vocab, mlp, tied, query_norms=False, norms=2, biases=False, experts=None):
    """Weights of a Llama or its like: a gated MLP or experts, tied or separate embeddings."""
    h, d = model.hidden_size, model.head_size
    attention = 2 * h * d * (model.num_query_heads + model.num_kv_heads)
    if biases:
        attention += d * (model.num_query_heads + 2 * model.num_kv_heads)
    feed_forward = 3 * h * mlp if experts is None else experts * (3 * h * mlp + h)
    layer = attention + feed_forward + norms * h + (2 * d if query_norms else 0)
    return model.num_layers * layer + vocab * h * (1 if tied else 2) + h


def gemma_3_27b(model):
    """A Gemma 3 and its eyes: a SigLIP of 27 layers over 64 x 64 patches, and a projector."""
    text = llama_like(model, vocab=262208, mlp=21504, tied=True, norms=4, query_norms=True)
    w, mlp = 1152, 4304
    layer = 4 * (w * w + w) + 2 * w * mlp + mlp + w + 4 * w
    patches = 3 * 14 * 14 * w + w + 64 * 64 * w
    return text + 27 * layer + patches + 2 * w + w * model.hidden_size + w


def gpt_oss(model, *, experts):
    """A gpt-oss: biases everywhere, a sink for each head, experts as wide as the model."""
    h, d = model.hidden_size, model.head_size
    q, kv = model.num_query_heads * d, model.num_kv_heads * d
    attention = h * (q + 2 * kv) + q * h + (q + 2 * kv + h) + model.num_query_heads
    expert = 3 * h * h + 3 * h
    layer = attention + experts * (expert + h + 1) + 2 * h
    return model.num_layers * layer + 2 * 201088 * h + h


@pytest.mark.parametrize(
    ("name", "count", "sizes"),
    [
        ("gpt2", opt_like, {"vocab": 50257, "positions": 1024}),
        ("opt-125m", opt_like, {"vocab": 50272, "positions": 2050}),
        ("opt-13b", opt_like, {"vocab": 50272, "positions": 2050}),
        ("opt-66b", opt_like, {"vocab": 50272, "positions": 2050}),
        ("opt-175b", opt_like, {"vocab": 50272, "positions": 2050}),
        ("llama-2-7b", llama_like, {"vocab": 32000, "mlp": 11008, "tied": False}),
        ("llama-2-13b", llama_like, {"vocab": 32000, "mlp": 13824, "tied": False}),
        ("llama-3-8b", llama_like, {"vocab": 128256, "mlp": 14336, "tied": False}),
        ("llama-3-70b", llama_like, {"vocab": 128256, "mlp": 28672, "tied": False}),
        ("llama-3.1-8b", llama_like, {"vocab": 128256, "mlp": 14336, "tied": False}),
        ("mistral-7b", llama_like, {"vocab": 32768, "mlp": 14336, "tied": False}),
        ("qwen2.5-7b", llama_like, {"vocab": 152064, "mlp": 18944, "tied": False, "biases": True}),
        (
            "qwen3-0.6b",
            llama_like,
            {"vocab": 151936, "mlp": 3072, "tied": True, "query_norms": True},
        ),
        (
            "qwen3-8b",
            llama_like,
            {"vocab": 151936, "mlp": 12288, "tied": False, "query_norms": True},
        ),
        (
            "qwen3-32b",
            llama_like,
            {"vocab": 151936, "mlp": 25600, "tied": False, "query_norms": True},
        ),
        (
            "qwen3-30b-a3b",
            llama_like,
            {"vocab": 151936, "mlp": 768, "tied": False, "query_norms": True, "experts": 128},
        ),
        ("smollm2-135m", llama_like, {"vocab": 49152, "mlp": 1536, "tied": True}),
        ("mistral-7b-v0.1", llama_like, {"vocab": 32000, "mlp": 14336, "tied": False}),
        ("gemma-2-9b", llama_like, {"vocab": 256000, "mlp": 14336, "tied": True, "norms": 4}),
        (
            "gemma-3-1b",
            llama_like,
            {"vocab": 262144, "mlp": 6912, "tied": True, "norms": 4, "query_norms": True},
        ),
        ("gemma-3-27b", gemma_3_27b, {}),
        ("gpt-oss-20b", gpt_oss, {"experts": 32}),
        ("gpt-oss-120b", gpt_oss, {"experts": 128}),
    ],
)
def test_a_presets_parameters_follow_from_its_shape(name, count, sizes):
    model = ModelConfig.preset(name)
    assert count(model, **sizes) == model.num_parameters


def test_every_preset_has_its_parameters_checked():
    marks = test_a_presets_parameters_follow_from_its_shape.pytestmark
    assert tuple(row[0] for row in marks[0].args[1]) == preset_names()


def test_a_cache_config_counts_its_slots_in_plain_integers():
    config = CacheConfig(block_size=np.int64(16), num_blocks=np.int32(100), dtype="float8_e4m3")
    assert config.num_slots == 1600
    assert type(config.block_size) is int


@pytest.mark.parametrize("value", [True, "16", 16.0, 0, -1, None], ids=repr)
@pytest.mark.parametrize("key", ["block_size", "num_blocks"])
def test_a_cache_config_refuses_what_is_no_positive_integer(key, value):
    with pytest.raises(ConfigError) as error:
        CacheConfig(**({"block_size": 16, "num_blocks": 8, "dtype": "float16"} | {key: value}))
    assert_one_sentence(error, key, repr(value))


@pytest.mark.parametrize("dtype", ["int8", "", None, 16], ids=repr)
def test_a_cache_config_refuses_an_unknown_dtype(dtype):
    with pytest.raises(ConfigError) as error:
        CacheConfig(16, 8, dtype)
    assert_one_sentence(error, "dtype", repr(dtype), "float8_e4m3")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be at most 10000"),
        ({"model_type": "bert"}, "an encoder keeps no KV cache"),
        ({"is_encoder_decoder": "false"}, "is_encoder_decoder must be false, not 'false'"),
        ({"quantization_config": "x" * 5000}, "quantization_config must be an object"),
    ],
)
def test_what_cannot_be_calculated_is_refused_in_a_short_sentence(change, sentence):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "intermediate_size": 100}
    ModelConfig.from_hf(config)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(config | change)
    assert sentence in str(error.value)
    assert len(str(error.value)) < 200
