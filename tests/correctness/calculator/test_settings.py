"""Budgets, and settings that contradict each other."""

import dataclasses

import pytest

from pagedattn.calculator.settings import gib_text
from pagedattn.config import ConfigError, ModelConfig
from pagedattn.hardware import GIB, find_gpu

LLAMA_2_7B = ModelConfig.preset("llama-2-7b")


def test_the_headlines_budget_is_80_percent_and_the_other_one_after_the_weights(settings):
    made = settings(model=LLAMA_2_7B, gpu=find_gpu("v100"), max_model_len=2048)
    whole, rest = made.budgets
    assert (whole.name, whole.num_slots, whole.num_blocks) == ("without-weights", 52_428, 3276)
    assert (rest.name, rest.num_bytes) == ("after-weights", whole.num_bytes - 2 * 6_738_415_616)
    assert whole.num_tokens == 3276 * 16
    assert whole.formula == "80 % of 32 GiB"
    assert rest.formula == "80 % of 32 GiB - 12.55 GiB of weights"


def test_weights_that_leave_too_little_leave_one_budget(settings):
    made = settings(model=LLAMA_2_7B, gpu=find_gpu("v100-16gb"), max_model_len=2048)
    assert [budget.name for budget in made.budgets] == ["without-weights"]
    given = settings(
        model=LLAMA_2_7B, gpu=find_gpu("v100-16gb"), max_model_len=2048, weight_bytes=4 * GIB
    )
    assert given.budgets[1].num_bytes == int(0.8 * 16 * GIB) - 4 * GIB


def test_unknown_weights_leave_one_budget(settings):
    model = dataclasses.replace(ModelConfig.preset("smollm2-135m"), num_parameters=None)
    assert len(settings(model=model).budgets) == 1


def test_a_given_kv_memory_is_the_only_budget(settings):
    (budget,) = settings(kv_bytes=GIB).budgets
    assert (budget.name, budget.num_bytes) == ("given", GIB)
    assert budget.num_tokens == GIB // (23_040 * 16) * 16


def test_a_gpu_of_a_group_has_its_share_of_weights_and_heads(settings):
    model = ModelConfig.preset("llama-3-70b")
    made = settings(model=model, gpu=find_gpu("a100"), memory={"tensor_parallel_size": 8})
    assert made.weights_on_gpu == -(-model.num_parameters * 2 // 8)
    assert made.budgets[0].num_slots == int(0.8 * 80 * GIB) // (2 * 80 * 1 * 128 * 2)


def test_scales_are_taken_from_the_budget(settings):
    made = settings(memory={"dtype": "float8_e4m3", "scales": "per-head"}, kv_bytes=GIB)
    assert made.budgets[0].num_slots == (GIB - 2 * 4 * 3 * 30) // 11_520


def test_a_window_lets_a_longer_request_fit(settings):
    # 8192 tokens are 180 MiB in all layers; a window of 64 in all but one of them leaves 8
    model = ModelConfig.preset("smollm2-135m")
    windowed = dataclasses.replace(
        model,
        layer_types=("full_attention", *["sliding_attention"] * 29),
        sliding_window=64,
    )
    assert settings(model=windowed, max_model_len=8192, kv_bytes=GIB // 32)
    with pytest.raises(ConfigError, match="the KV cache must hold a request of 8192 tokens"):
        settings(model=model, max_model_len=8192, kv_bytes=GIB // 32)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_users": 0}, ("--users must be a positive integer", "not 0")),
        ({"own_tokens": -1}, ("--own-tokens", "-1")),
        ({"system_prompt_tokens": 0}, ("--system-prompt-tokens", "0")),
        ({"system_prompt_tokens": 503}, ("at most 512", "not 513")),
        ({"num_users": 166_667}, ("--users must be at most 166666", "60 tokens", "not 166667")),
        ({"max_model_len": 8193}, ("--max-model-len", "8192", "smollm2-135m", "8193")),
        ({"utilization": 0.0}, ("--gpu-memory-utilization", "not 0")),
        ({"utilization": 1.01}, ("--gpu-memory-utilization", "1.01")),
        ({"kv_bytes": 1 << 20}, ("request of 512 tokens", "11.25 MiB", "has 1 MiB")),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(settings, changes, parts):
    with pytest.raises(ConfigError) as error:
        settings(**changes)
    message = str(error.value)
    assert message.endswith(".")
    assert ". " not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (32 * GIB, "32 GiB"),
        (GIB * 13.05, "13.05 GiB"),
        (3 << 20, "3 MiB"),
        (12345678, "11.77 MiB"),
    ],
)
def test_bytes_are_written_in_gib_or_mib(num_bytes, text):
    assert gib_text(num_bytes) == text
