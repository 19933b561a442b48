"""The shapes for random weights are those of the presets, to the last parameter."""

import pytest

from pagedattn.config import ConfigError, ModelConfig
from pagedattn.serving.shapes import hf_config, shape_names


@pytest.mark.parametrize("name", shape_names())
def test_a_shape_is_the_preset_parameters_included(name):
    assert ModelConfig.from_hf(hf_config(name) | {"_name_or_path": name}).num_parameters
    read = ModelConfig.from_hf(hf_config(name))
    preset = ModelConfig.preset(name)
    for field in (
        "num_layers",
        "num_query_heads",
        "num_kv_heads",
        "head_size",
        "hidden_size",
        "max_model_len",
        "dtype",
        "num_parameters",
        "layer_types",
    ):
        assert getattr(read, field) == getattr(preset, field), field


def test_a_preset_without_a_whole_shape_is_refused():
    with pytest.raises(ConfigError, match="whole shape is known"):
        hf_config("gpt-oss-20b")
    with pytest.raises(ConfigError, match="preset must be one of"):
        hf_config("llama-9")
