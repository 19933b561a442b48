"""Which layers have windows and which keep no KV, read from every way to say so."""

import json
from pathlib import Path

import pytest

from pagedattn.config import ConfigError, LayerGroup, ModelConfig

PLAIN = {
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
FULL, SLIDING, NONE = "full_attention", "sliding_attention", "without_kv"


def types_of(extra):
    return ModelConfig.from_hf(PLAIN | extra).layer_types


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 3},
        {"use_sliding_window": False, "sliding_window": 4096},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 6},
        {"layer_types": [FULL] * 6, "sliding_window": 4096},
        {"sliding_window": 4096, "sliding_window_pattern": 1},
        {"model_type": "gemma3_text", "sliding_window": None},
    ],
    ids=[
        "llama",
        "mistral-v0.3",
        "qwen2",
        "use false",
        "from the last layer on",
        "all listed full",
        "every layer full",
        "no window",
    ],
)
def test_without_a_window_in_use_all_layers_see_all_tokens(extra):
    model = ModelConfig.from_hf(PLAIN | extra)
    assert (model.layer_types, model.sliding_window) == ((), None)
    assert model.layer_groups == (LayerGroup(6, None),)
    assert model.num_kv_layers == 6


@pytest.mark.parametrize(
    ("extra", "types"),
    [
        ({"model_type": "mistral"}, (SLIDING,) * 6),
        ({"model_type": "phi3"}, (SLIDING,) * 6),
        ({"use_sliding_window": True, "max_window_layers": 4}, (FULL,) * 4 + (SLIDING,) * 2),
        ({"use_sliding_window": True}, (SLIDING,) * 6),
        ({"model_type": "gemma2"}, (SLIDING, FULL) * 3),
        ({"model_type": "gemma3_text"}, (SLIDING,) * 5 + (FULL,)),
        ({"sliding_window_pattern": 3}, (SLIDING, SLIDING, FULL) * 2),
        ({"layer_types": [SLIDING, FULL] * 3, "model_type": "qwen3"}, (SLIDING, FULL) * 3),
        ({"layer_types": [FULL, SLIDING, "linear_attention"] * 2}, (FULL, SLIDING, NONE) * 2),
    ],
    ids=[
        "mistral",
        "phi3",
        "qwen2 in use",
        "in use for all",
        "gemma2",
        "gemma3",
        "pattern",
        "listed",
        "listed hybrid",
    ],
)
def test_a_windows_layers_are_found(extra, types):
    model = ModelConfig.from_hf(PLAIN | {"sliding_window": 1024} | extra)
    assert (model.layer_types, model.sliding_window) == (types, 1024)


def test_layers_are_counted_in_groups_of_what_they_keep():
    listed = [SLIDING, "linear_attention", FULL, SLIDING, "mamba", SLIDING]
    model = ModelConfig.from_hf(PLAIN | {"layer_types": listed, "sliding_window": 64})
    assert model.layer_groups == (LayerGroup(1, None), LayerGroup(3, 64))
    assert (model.num_layers, model.num_kv_layers) == (6, 4)


@pytest.mark.parametrize(
    ("extra", "with_kv"),
    [
        ({"layer_types": ["linear_attention", "linear_attention", FULL] * 2}, [2, 5]),
        ({"layers_block_type": ["mamba", "attention", "mamba2", "conv", "mlp", "moe"]}, [1]),
        ({"layers_block_type": ["mamba", "hybrid"] * 3}, [1, 3, 5]),
        ({"hybrid_override_pattern": "M-M*E*"}, [3, 5]),
        ({"attn_layer_indices": [4]}, [4]),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, [1, 5]),
        ({"attn_layer_period": 3}, [0, 3]),
        ({"full_attention_interval": 3}, [2, 5]),
        ({"model_type": "qwen3_next"}, [3]),
        ({"num_kv_shared_layers": 4}, [0, 1]),
    ],
    ids=[
        "listed",
        "blocks listed",
        "attention beside a state",
        "letters",
        "bamba",
        "jamba",
        "jamba without offset",
        "interval",
        "qwen3-next",
        "shared",
    ],
)
def test_layers_without_kv_are_found(extra, with_kv):
    expected = tuple(FULL if i in with_kv else NONE for i in range(6))
    model = ModelConfig.from_hf(PLAIN | extra)
    assert model.layer_types == expected
    assert model.num_kv_layers == len(with_kv)


def test_a_gemma_3_of_which_the_config_says_little_has_its_architectures_defaults():
    # as in google/gemma-3-12b-it, whose heads are not hidden_size / heads = 240 wide
    text = {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
    }
    model = ModelConfig.from_hf({"text_config": text, "torch_dtype": "bfloat16"})
    assert (model.head_size, model.max_model_len) == (256, 131_072)
    assert model.layer_groups == (LayerGroup(8, None), LayerGroup(40, 1024))


def assert_refused(extra, *parts):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(PLAIN | extra)
    message = str(error.value)
    assert message.endswith(".")
    assert ". " not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"layer_types": [FULL] * 5}, ("layer_types", "6 layers", "5")),
        ({"layer_types": FULL}, ("layer_types must be a list",)),
        ({"layer_types": [FULL] * 5 + [7]}, ("layer_types must hold", "not 7")),
        ({"layer_types": ["chunked_attention"] * 6}, ("'chunked_attention'", "full_attention")),
        ({"layer_types": [SLIDING] * 6}, ("sliding_window", "absent")),
        ({"layer_types": ["mamba"] * 6}, ("layer that keeps K and V",)),
        ({"hybrid_override_pattern": "M-M*X*"}, ("hybrid_override_pattern", "'X'")),
        ({"sliding_window": 0}, ("sliding_window must be a positive integer", "not 0")),
        ({"sliding_window": "4096"}, ("sliding_window", "'4096'")),
        ({"sliding_window": 64, "sliding_window_pattern": "LLLG"}, ("sliding_window_pattern",)),
        ({"use_sliding_window": 1, "sliding_window": 64}, ("use_sliding_window", "not 1")),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": -1},
            ("max_window_layers", "-1"),
        ),
        ({"attn_layer_indices": [6]}, ("attn_layer_indices", "0 to 5")),
        ({"attn_layer_period": 4, "attn_layer_offset": 4}, ("attn_layer_offset", "0 to 3")),
        ({"full_attention_interval": 0}, ("full_attention_interval", "not 0")),
        ({"num_kv_shared_layers": 6}, ("num_kv_shared_layers", "6")),
        ({"num_kv_shared_layers": -1}, ("num_kv_shared_layers", "-1")),
        ({"attention_chunk_size": 8192}, ("attention_chunk_size", "8192", "chunks")),
        ({"global_head_dim": 512}, ("global_head_dim", "two sizes")),
        ({"v_head_dim": 64, "head_dim": 128}, ("v_head_dim", "64")),
        ({"is_encoder_decoder": True}, ("is_encoder_decoder", "decoders")),
        ({"attn_type_list": [0, 1]}, ("attn_type_list",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_calculated_is_refused_with_its_key(extra, parts):
    assert_refused(extra, *parts)


def test_an_exact_interval_of_one_leaves_every_layer_its_kv(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PLAIN | {"full_attention_interval": 1}))
    assert ModelConfig.from_hf(path).layer_types == ()
