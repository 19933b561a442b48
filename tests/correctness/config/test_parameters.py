"""Parameters counted from a config, and the bytes of their weights."""

import pytest

from pagedattn.config import ConfigError, ModelConfig

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "quantization_config": {"quant_method": "mxfp4"},
}


# Counted by transformers 5.23 for the same configs: the model's own num_parameters().
@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (LLAMA, 8_030_261_248),
        (
            LLAMA
            | {
                "num_hidden_layers": 3,
                "attention_bias": True,
                "mlp_bias": True,
                "tie_word_embeddings": True,
            },
            1_179_805_696,
        ),
        (
            LLAMA | {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8},
            46_702_792_704,
        ),
        (QWEN3_MOE, 30_532_122_624),
        (
            LLAMA
            | {
                "model_type": "qwen2",
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "vocab_size": 152064,
            },
            7_615_616_512,
        ),
        (
            {
                "model_type": "gpt2",
                "n_layer": 12,
                "n_head": 12,
                "n_embd": 768,
                "n_positions": 1024,
                "vocab_size": 50257,
            },
            124_439_808,
        ),
        (
            {
                "model_type": "opt",
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "hidden_size": 768,
                "ffn_dim": 3072,
                "max_position_embeddings": 2048,
                "vocab_size": 50272,
            },
            125_239_296,
        ),
        (
            {
                "model_type": "gemma",
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "hidden_size": 3072,
                "intermediate_size": 24576,
                "vocab_size": 256000,
                "max_position_embeddings": 8192,
            },
            8_537_680_896,
        ),
        (
            {
                "model_type": "gemma2",
                "num_hidden_layers": 42,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "hidden_size": 3584,
                "intermediate_size": 14336,
                "vocab_size": 256000,
                "max_position_embeddings": 8192,
            },
            9_241_705_984,
        ),
        (
            {
                "model_type": "gemma3_text",
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "hidden_size": 3840,
                "intermediate_size": 15360,
            },
            11_766_034_176,
        ),
        (
            {
                "model_type": "phi3",
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "vocab_size": 32064,
                "max_position_embeddings": 4096,
            },
            3_821_079_552,
        ),
        (
            {key: value for key, value in GPT_OSS.items() if key != "quantization_config"},
            20_914_757_184,
        ),
    ],
    ids=[
        "llama",
        "llama-biases-tied",
        "mixtral",
        "qwen3-moe",
        "qwen2",
        "gpt2",
        "opt",
        "gemma",
        "gemma2",
        "gemma3",
        "phi3",
        "gpt-oss",
    ],
)
def test_known_architectures_are_counted_exactly(config, num_parameters):
    model = ModelConfig.from_hf(config)
    assert model.num_parameters == num_parameters
    assert not model.parameters_are_estimated
    assert model.weight_bytes == num_parameters * (2 if model.dtype == "bfloat16" else 4)


@pytest.mark.parametrize(
    ("config", "counted"),
    [
        (
            {
                "model_type": "glm4_moe",
                "num_hidden_layers": 46,
                "num_attention_heads": 96,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "hidden_size": 4096,
                "intermediate_size": 10944,
                "moe_intermediate_size": 1408,
                "n_routed_experts": 128,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "vocab_size": 151552,
                "max_position_embeddings": 131072,
                "attention_bias": True,
            },
            106_852_245_504,
        ),
        (
            {
                "model_type": "qwen3_next",
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "hidden_size": 2048,
                "intermediate_size": 5120,
                "moe_intermediate_size": 512,
                "shared_expert_intermediate_size": 512,
                "num_experts": 512,
                "vocab_size": 151936,
                "max_position_embeddings": 262144,
            },
            79_674_391_296,
        ),
    ],
    ids=["glm4-moe", "qwen3-next"],
)
def test_another_architecture_is_estimated_and_says_so(config, counted):
    model = ModelConfig.from_hf(config)
    assert model.parameters_are_estimated
    assert model.num_parameters == pytest.approx(counted, rel=0.01)


def test_a_model_with_eyes_is_an_estimate_of_its_language_part():
    model = ModelConfig.from_hf({"text_config": LLAMA, "vision_config": {}})
    assert (model.num_parameters, model.parameters_are_estimated) == (8_030_261_248, True)


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_without_a_size_that_is_needed_the_parameters_are_unknown(key):
    config = {name: value for name, value in LLAMA.items() if name != key}
    model = ModelConfig.from_hf(config)
    assert model.num_parameters is None
    assert model.weight_bytes is None


def test_gpt_oss_weighs_what_its_files_do():
    # 13.76 GB of safetensors: experts at 4 bits with a scale of 8 for every 32, bfloat16 elsewhere
    model = ModelConfig.from_hf(GPT_OSS)
    assert model.weight_bytes == ModelConfig.preset("gpt-oss-20b").weight_bytes == 13_761_264_768
    assert model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("quantised", "num_bytes"),
    [
        # 6.98 G in the layers' matrices; 1.05 G in embeddings and norms, of 2 bytes
        ({"quant_method": "fp8"}, 6_979_321_856 + 2 * 1_050_939_392),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 6_979_321_856 // 2 + 2_101_878_784),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            round(6_979_321_856 * (4 + 20 / 128) / 8) + 2_101_878_784,
        ),
    ],
    ids=["fp8", "gptq", "awq"],
)
def test_quantised_weights_are_estimated_from_their_bits(quantised, num_bytes):
    model = ModelConfig.from_hf(LLAMA | {"quantization_config": quantised})
    assert model.weight_bytes == num_bytes
    assert model.num_parameters == 8_030_261_248
    assert model.parameters_are_estimated


@pytest.mark.parametrize("quantised", [{"quant_method": "new"}, {"quant_method": "gptq"}, {}])
def test_weights_of_an_unknown_quantisation_are_unknown(quantised):
    model = ModelConfig.from_hf(LLAMA | {"quantization_config": quantised})
    assert (model.num_parameters, model.weight_bytes) == (None, None)


@pytest.mark.parametrize(
    "extra",
    [
        {"vocab_size": "many"},
        {"intermediate_size": 1.5},
        {"attention_bias": "no"},
        {"tie_word_embeddings": 1},
        {"num_local_experts": -8},
        {"quantization_config": "fp8"},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_malformed_size_is_refused_with_its_key(extra):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(LLAMA | extra)
    assert next(iter(extra)) in str(error.value)
    assert str(error.value).endswith(".")


def test_a_model_type_that_is_no_name_is_only_not_known():
    assert ModelConfig.from_hf(LLAMA | {"model_type": ["llama"]}).parameters_are_estimated
