"""A model's and a KV cache's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from pagedattn.config.checks import (
    CACHE_DTYPES,
    DTYPE_BYTES,
    MODEL_DTYPES,
    ConfigError,
    check_groups,
    one_of,
    positive_int,
)

LAYER_TYPES = ("full_attention", "sliding_attention", "without_kv")
"""What a layer keeps of a sequence: K and V of all tokens, of a window's, or of none."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep K and V of the same tokens: of the last ``window`` ones, or of all.

    A query sees ``window`` tokens, itself included; ``None`` is full attention.
    """

    num_layers: int
    window: int | None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a decoder-only transformer that decide what its KV cache costs.

    ``head_size`` is the width of one head; it need not be ``hidden_size / num_query_heads``.
    ``max_model_len`` counts tokens. ``num_parameters`` is ``None`` where it is not known;
    ``parameters_are_estimated`` says that it was counted from an architecture not known exactly.
    ``num_weight_bytes`` is the size of weights that are not all in ``dtype``, as quantised ones;
    otherwise ``None``. ``layer_types`` has one of ``LAYER_TYPES`` for each layer, in order, and is
    empty where all layers have full attention; ``sliding_window`` is the tokens that a query of a
    sliding layer sees, itself included, and ``None`` where there is no such layer. Raises
    :class:`ConfigError`.
    """

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    max_model_len: int
    dtype: str
    num_parameters: int | None = None
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    num_weight_bytes: int | None = None
    parameters_are_estimated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name must be a non-empty string, not {short_repr(self.name)}.")
        for key in _COUNTS:
            object.__setattr__(self, key, positive_int(key, getattr(self, key)))
        for key in ("num_parameters", "num_weight_bytes", "sliding_window"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, positive_int(key, getattr(self, key)))
        check_groups("num_query_heads", self.num_query_heads, "num_kv_heads", self.num_kv_heads)
        one_of("dtype", self.dtype, MODEL_DTYPES)
        self._check_layers()

    def _check_layers(self) -> None:
        types = tuple(one_of("layer_types", value, LAYER_TYPES) for value in self.layer_types)
        if types and len(types) != self.num_layers:
            raise ConfigError(
                f"layer_types must name num_layers = {self.num_layers} layers, not {len(types)}."
            )
        if types and set(types) == {"without_kv"}:
            raise ConfigError("layer_types must have a layer that keeps K and V.")
        if ("sliding_attention" in types) != (self.sliding_window is not None):
            raise ConfigError(
                f"sliding_window must be given exactly where layer_types has sliding_attention, "
                f"not {self.sliding_window}."
            )
        is_plain = set(types) <= {"full_attention"}
        object.__setattr__(self, "layer_types", () if is_plain else types)

    @property
    def num_queries_per_kv(self) -> int:
        """How many query heads share one KV head: 1 for multi-head attention."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers that keep K and V: those of all tokens first, then those of a window."""
        if not self.layer_types:
            return (LayerGroup(self.num_layers, None),)
        counts = {kind: self.layer_types.count(kind) for kind in LAYER_TYPES}
        groups = (
            LayerGroup(counts["full_attention"], None),
            LayerGroup(counts["sliding_attention"], self.sliding_window),
        )
        return tuple(group for group in groups if group.num_layers)

    @property
    def num_kv_layers(self) -> int:
        """How many layers keep K and V at all."""
        return sum(group.num_layers for group in self.layer_groups)

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of all weights, or ``None`` where the number of parameters is not known."""
        if self.num_weight_bytes is not None or self.num_parameters is None:
            return self.num_weight_bytes
        return self.num_parameters * DTYPE_BYTES[self.dtype]

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | PathLike[str]) -> ModelConfig:
        """Read a Hugging Face ``config.json``: its mapping, its path, or the folder that holds it.

        A nested ``text_config`` is used where there is one. ``head_dim`` and
        ``num_key_value_heads`` are honoured; absent or null, they become ``hidden_size / heads``
        and the number of query heads, or what the architecture has as its default. Without a dtype
        the model is ``float32``, as transformers has it. Layers' windows, and layers that keep no
        K and V, are read as :mod:`pagedattn.config.layers` says, and parameters are counted as
        :mod:`pagedattn.config.parameters` says. Raises :class:`ConfigError`.
        """
        from pagedattn.config.hf import model_from_mapping, read_json

        if isinstance(source, Mapping):
            return model_from_mapping(source, "model")
        if not isinstance(source, str | PathLike):
            raise ConfigError(
                f"source must be a mapping or the path of a config.json or of its folder, "
                f"not {short_repr(source)}."
            )
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        return model_from_mapping(read_json(path), path.absolute().parent.name or "model")

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """Return a well-known model by its short name or its hub id, in any case of letters.

        Raises :class:`ConfigError`, which names the known ones.
        """
        from pagedattn.config.presets import find_preset

        return find_preset(name)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """How a KV cache is cut: ``num_blocks`` blocks of ``block_size`` tokens, in ``dtype``.

    Raises :class:`ConfigError`.
    """

    block_size: int
    num_blocks: int
    dtype: str

    def __post_init__(self) -> None:
        for key in ("block_size", "num_blocks"):
            object.__setattr__(self, key, positive_int(key, getattr(self, key)))
        one_of("dtype", self.dtype, CACHE_DTYPES)

    @property
    def num_slots(self) -> int:
        """How many tokens the cache can hold."""
        return self.block_size * self.num_blocks


_COUNTS = (
    "num_layers",
    "num_query_heads",
    "num_kv_heads",
    "head_size",
    "hidden_size",
    "max_model_len",
)
