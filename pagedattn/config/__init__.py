"""What a model and a KV cache look like, in numbers: read from a Hugging Face config or a preset.

Every mistake raises :class:`ConfigError` with one sentence that names the key, what was given and
what is allowed.
"""

from pagedattn.config.checks import (
    CACHE_DTYPES,
    DTYPE_BYTES,
    MODEL_DTYPES,
    ConfigError,
    one_of,
    positive_int,
)
from pagedattn.config.model import CacheConfig, LayerGroup, ModelConfig
from pagedattn.config.presets import preset_names

__all__ = [
    "CACHE_DTYPES",
    "DTYPE_BYTES",
    "MODEL_DTYPES",
    "CacheConfig",
    "ConfigError",
    "LayerGroup",
    "ModelConfig",
    "one_of",
    "positive_int",
    "preset_names",
]
