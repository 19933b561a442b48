"""A small calculation, done once: a GPU of 2 GiB and a model of 24 KiB a token."""

from __future__ import annotations

import dataclasses

import pytest

from pagedattn.calculator import Calculation, Settings, Workload
from pagedattn.config import ModelConfig
from pagedattn.hardware import GIB, GPU
from pagedattn.memory import KVMemory


def make_settings(**changes):
    """Settings that calculate in a second; `changes` replace some, `model` and `memory` too."""
    most = changes.get("max_model_len", 512)
    model = changes.pop("model", ModelConfig.preset("smollm2-135m"))
    workload = Workload.named("sharegpt", most, seed=0)
    defaults = {
        "gpu": GPU("small", GIB // 2, 100e9, 10e12),
        "memory": KVMemory(model, **changes.pop("memory", {})),
        "max_model_len": most,
        "utilization": 0.8,
        "waste_requests": workload.scaled_to(0.25 * most),
        "user_requests": workload.scaled_to(0.25 * most),
        "num_users": 10,
        "system_prompt_tokens": 50,
        "own_tokens": 10,
        "seed": 0,
    }
    return Settings(**(defaults | changes))


@pytest.fixture(scope="session")
def settings():
    """Make settings; keyword arguments replace the small ones."""
    return make_settings


@pytest.fixture(scope="session")
def small():
    """The small calculation."""
    return Calculation.of(make_settings(), lambda _: None)


@pytest.fixture(scope="session")
def windowed():
    """A calculation of a model of which every second layer has a window of 64."""
    plain = ModelConfig.preset("smollm2-135m")
    model = dataclasses.replace(
        plain, layer_types=("sliding_attention", "full_attention") * 15, sliding_window=64
    )
    return Calculation.of(make_settings(model=model), lambda _: None)
