"""Well-known models, by name."""

from __future__ import annotations

from reprlib import repr as short_repr

from pagedattn.config.checks import ConfigError
from pagedattn.config.model import ModelConfig


def preset_names() -> tuple[str, ...]:
    """Return the short names that :meth:`ModelConfig.preset` knows, in its table's order."""
    return tuple(_PRESETS)


def find_preset(name: str) -> ModelConfig:
    """Return the model of a short name or hub id; raise :class:`ConfigError` for another name."""
    key = name.lower() if isinstance(name, str) else ""
    key = _ALIASES.get(key, key)
    if key not in _PRESETS:
        raise ConfigError(
            f"preset must be one of {', '.join(preset_names())}, not {short_repr(name)}."
        )
    return _PRESETS[key]


def _windows(num_layers: int, window: int, pattern: int) -> tuple[tuple[str, ...], int]:
    """Return the kinds of layers where every ``pattern``-th, or with 0 none, has full attention."""
    kinds = (
        "full_attention" if pattern and (i + 1) % pattern == 0 else "sliding_attention"
        for i in range(num_layers)
    )
    return tuple(kinds), window


# name: layers, query heads, KV heads, head size, hidden size, maximum length, dtype, parameters,
# from each model's config.json; OPT-175B's, which is not on the hub, from the OPT paper's Table 1.
_PLAIN = {
    "gpt2": (12, 12, 12, 64, 768, 1024, "float32", 124_439_808),
    "opt-125m": (12, 12, 12, 64, 768, 2048, "float16", 125_239_296),
    "opt-13b": (40, 40, 40, 128, 5120, 2048, "float16", 12_853_473_280),
    "opt-66b": (64, 72, 72, 128, 9216, 2048, "float16", 65_719_701_504),
    "opt-175b": (96, 96, 96, 128, 12288, 2048, "float16", 174_604_468_224),
    "llama-2-7b": (32, 32, 32, 128, 4096, 4096, "float16", 6_738_415_616),
    "llama-2-13b": (40, 40, 40, 128, 5120, 4096, "float16", 13_015_864_320),
    "llama-3-8b": (32, 32, 8, 128, 4096, 8192, "bfloat16", 8_030_261_248),
    "llama-3-70b": (80, 64, 8, 128, 8192, 8192, "bfloat16", 70_553_706_496),
    "llama-3.1-8b": (32, 32, 8, 128, 4096, 131_072, "bfloat16", 8_030_261_248),
    "mistral-7b": (32, 32, 8, 128, 4096, 32768, "bfloat16", 7_248_023_552),
    "qwen2.5-7b": (28, 28, 4, 128, 3584, 131_072, "bfloat16", 7_615_616_512),
    "qwen3-0.6b": (28, 16, 8, 128, 1024, 40960, "bfloat16", 596_049_920),
    "qwen3-8b": (36, 32, 8, 128, 4096, 40960, "bfloat16", 8_190_735_360),
    "qwen3-32b": (64, 64, 8, 128, 5120, 40960, "bfloat16", 32_762_123_264),
    "qwen3-30b-a3b": (48, 32, 4, 128, 2048, 40960, "bfloat16", 30_532_122_624),
    "smollm2-135m": (30, 9, 3, 64, 576, 8192, "bfloat16", 134_515_008),
}

# the same, then layers' kinds and window, and the bytes of gpt-oss's weights, whose experts have
# 4 bits a parameter and 8 for every 32
_WITH_WINDOWS = {
    "mistral-7b-v0.1": (
        *(32, 32, 8, 128, 4096, 32768, "bfloat16", 7_241_732_096),
        *_windows(32, 4096, 0),
    ),
    "gemma-2-9b": (
        *(42, 16, 8, 256, 3584, 8192, "bfloat16", 9_241_705_984),
        *_windows(42, 4096, 2),
    ),
    "gemma-3-1b": (
        *(26, 4, 1, 256, 1152, 32768, "bfloat16", 999_885_952),
        *_windows(26, 512, 6),
    ),
    "gemma-3-27b": (
        *(62, 32, 16, 128, 5376, 131_072, "bfloat16", 27_432_406_640),
        *_windows(62, 1024, 6),
    ),
    "gpt-oss-20b": (
        *(24, 64, 8, 64, 2880, 131_072, "bfloat16", 20_914_757_184),
        *(*_windows(24, 128, 2), 13_761_264_768),
    ),
    "gpt-oss-120b": (
        *(36, 64, 8, 64, 2880, 131_072, "bfloat16", 116_829_156_672),
        *(*_windows(36, 128, 2), 65_248_815_744),
    ),
}

_PRESETS = {name: ModelConfig(name, *row) for name, row in (_PLAIN | _WITH_WINDOWS).items()}

_ALIASES = {
    "openai-community/gpt2": "gpt2",
    "facebook/opt-125m": "opt-125m",
    "facebook/opt-13b": "opt-13b",
    "facebook/opt-66b": "opt-66b",
    "meta-llama/llama-2-7b-hf": "llama-2-7b",
    "meta-llama/llama-2-13b-hf": "llama-2-13b",
    "meta-llama/meta-llama-3-8b": "llama-3-8b",
    "meta-llama/meta-llama-3-70b": "llama-3-70b",
    "meta-llama/llama-3.1-8b": "llama-3.1-8b",
    "mistralai/mistral-7b-v0.1": "mistral-7b-v0.1",
    "mistralai/mistral-7b-v0.3": "mistral-7b",
    "google/gemma-2-9b": "gemma-2-9b",
    "google/gemma-3-1b-it": "gemma-3-1b",
    "google/gemma-3-27b-it": "gemma-3-27b",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "qwen/qwen2.5-7b": "qwen2.5-7b",
    "qwen/qwen3-0.6b": "qwen3-0.6b",
    "qwen/qwen3-8b": "qwen3-8b",
    "qwen/qwen3-32b": "qwen3-32b",
    "qwen/qwen3-30b-a3b": "qwen3-30b-a3b",
    "huggingfacetb/smollm2-135m": "smollm2-135m",
}
