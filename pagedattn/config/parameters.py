"""How many parameters a Hugging Face config describes, and what their weights weigh.

A decoder's parameters, for hidden size h, q = query heads * head size and kv likewise:

- embeddings: vocabulary * h, twice where the output's are not tied to the input's;
- attention, a layer: h * (q + 2 kv) + q * h, and its biases;
- gated MLP, a layer: 3 * h * intermediate size; a mixture of experts has that for each expert, and
  h * experts for the router; GPT-2's and OPT's MLP has two matrices and biases;
- norms: 2 h a layer (4 h in Gemma 2 and 3) and h at the end.

The count is exact for the architectures in ``_EXACT`` and an estimate for others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any

from pagedattn.config.checks import DTYPE_BYTES, ConfigError, positive_int

if TYPE_CHECKING:
    from pagedattn.config.model import ModelConfig

# fmt: off
# several names a line
_EXACT = frozenset({
    "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "llama", "mistral", "mixtral", "opt",
    "phi3", "qwen2", "qwen3", "qwen3_moe",
})
_UNGATED = frozenset({
    "bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "opt", "phi", "starcoder2",
})
# fmt: on
_QKV_BIASES = frozenset({"qwen2", "qwen2_moe"})
_QUERY_KEY_NORMS = frozenset({"gemma3_text", "qwen3", "qwen3_moe", "qwen3_next"})
_FOUR_NORMS = frozenset({"gemma2", "gemma3_text"})

# bits of a weight in a mixture of experts of gpt-oss: 4, and 8 for the scale of every 32
_MXFP4_BITS = 4.25


@dataclass(frozen=True, slots=True)
class _Counts:
    """Parameters by how quantisation treats them: experts, other matrices, the rest."""

    experts: int
    matrices: int
    rest: int

    @property
    def total(self) -> int:
        return self.experts + self.matrices + self.rest


def count_parameters(
    model: ModelConfig, text: Mapping[str, Any], config: Mapping[str, Any]
) -> ModelConfig:
    """Return ``model`` with its parameters counted, or as it is if the config lacks their sizes.

    ``text`` is the language model's part of ``config``. The weights of a quantised model are
    estimated; where its method is not known, its parameters are left unknown too, so that nothing
    is worked out from a wrong width.
    """
    if _size(text, "vocab_size") is None:
        return model
    kind = _kind(text)
    counts = _ungated(model, text) if kind in _UNGATED else _gated(model, text)
    if counts is None:
        return model
    quantised = text.get("quantization_config") or config.get("quantization_config")
    num_bytes = None
    if quantised is not None:
        num_bytes = _quantised_bytes(counts, quantised, DTYPE_BYTES[model.dtype])
        if num_bytes is None:
            return model
    is_exact = kind in _EXACT and "vision_config" not in config and quantised is None
    return dataclasses.replace(
        model,
        num_parameters=counts.total,
        num_weight_bytes=num_bytes,
        parameters_are_estimated=not is_exact,
    )


def _kind(text: Mapping[str, Any]) -> str:
    kind = text.get("model_type")
    return kind if isinstance(kind, str) else ""


def _size(text: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first of these keys that is there, a positive integer, or ``None``."""
    for key in keys:
        if text.get(key) is not None:
            return positive_int(key, text[key])
    return None


def _flag(text: Mapping[str, Any], key: str) -> bool:
    value = text.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, not {short_repr(value)}.")
    return bool(value)


def _gated(model: ModelConfig, text: Mapping[str, Any]) -> _Counts | None:
    """Count a Llama-like decoder, with or without experts."""
    intermediate = _size(text, "intermediate_size", "ffn_hidden_size")
    expert_size = _size(text, "moe_intermediate_size") or intermediate
    if expert_size is None:
        return None
    h, kind = model.hidden_size, _kind(text)
    q, kv = (heads * model.head_size for heads in (model.num_query_heads, model.num_kv_heads))
    num_experts = _size(text, "num_local_experts", "num_experts", "n_routed_experts") or 1
    num_sparse = max(0, model.num_layers - _num_dense(text)) if num_experts > 1 else 0
    num_dense = model.num_layers - num_sparse
    experts = num_sparse * num_experts * 3 * h * expert_size
    shared = _size(text, "shared_expert_intermediate_size")
    if shared is None:
        shared = (_size(text, "n_shared_experts") or 0) * expert_size
    matrices = model.num_layers * (h * (q + 2 * kv) + q * h)
    matrices += num_dense * 3 * h * (intermediate or expert_size) + num_sparse * 3 * h * shared
    rest = _embeddings(model, text) + h
    rest += model.num_layers * h * (4 if kind in _FOUR_NORMS else 2)
    rest += num_sparse * h * num_experts
    if kind in _QUERY_KEY_NORMS:
        rest += model.num_layers * 2 * model.head_size
    has_bias = _flag(text, "attention_bias")
    if has_bias or kind in _QKV_BIASES:
        rest += model.num_layers * (q + 2 * kv + (h if has_bias else 0))
    if _flag(text, "mlp_bias"):
        rest += num_dense * (2 * (intermediate or expert_size) + h)
    if kind == "gpt_oss":  # biases of experts and router, and an attention sink for each head
        rest += num_sparse * num_experts * (2 * expert_size + h + 1)
        rest += model.num_layers * model.num_query_heads
    return _Counts(experts, matrices, rest)


def _num_dense(text: Mapping[str, Any]) -> int:
    """How many layers of a mixture of experts have an ordinary MLP."""
    listed, first = text.get("mlp_only_layers"), text.get("first_k_dense_replace")
    if isinstance(listed, list) and listed:
        return len(listed)
    return first if type(first) is int and first > 0 else 0


def _ungated(model: ModelConfig, text: Mapping[str, Any]) -> _Counts:
    """Count a GPT-2-like decoder: two matrices in the MLP, and a bias for each matrix and norm."""
    h, kind = model.hidden_size, _kind(text)
    q, kv = (heads * model.head_size for heads in (model.num_query_heads, model.num_kv_heads))
    intermediate = _size(text, "ffn_dim", "intermediate_size", "n_inner", "ffn_hidden_size")
    intermediate = intermediate or 4 * h
    matrices = model.num_layers * (h * (q + 2 * kv) + q * h + 2 * h * intermediate)
    biases = (q + 2 * kv + h) + (intermediate + h)
    rest = model.num_layers * (biases + 4 * h) + 2 * h + _embeddings(model, text)
    if kind in ("gpt2", "opt"):  # learned positions; OPT's table has two more
        rest += h * (model.max_model_len + (2 if kind == "opt" else 0))
    return _Counts(0, matrices, rest)


def _embeddings(model: ModelConfig, text: Mapping[str, Any]) -> int:
    vocabulary = positive_int("vocab_size", text["vocab_size"])
    return vocabulary * model.hidden_size * (1 if _flag(text, "tie_word_embeddings") else 2)


def _quantised_bytes(counts: _Counts, quantised: object, item_bytes: int) -> int | None:
    """Return the bytes of weights of which some are quantised, or ``None`` if it is not known."""
    if not isinstance(quantised, Mapping):
        raise ConfigError(f"quantization_config must be an object, not {short_repr(quantised)}.")
    method, bits = quantised.get("quant_method"), quantised.get("bits")
    if method == "mxfp4":
        return round(counts.experts * _MXFP4_BITS / 8) + item_bytes * (
            counts.matrices + counts.rest
        )
    if method == "fp8":
        bits = 8
    elif method in ("gptq", "awq") and type(bits) is int and 2 <= bits <= 8:
        group = quantised.get("group_size")
        if type(group) is int and group > 0:  # a scale of 16 bits and a zero point for each group
            bits += (16 + bits) / group
    else:
        return None
    return round((counts.experts + counts.matrices) * bits / 8) + item_bytes * counts.rest
