"""The files of a Llama in a Hugging Face folder: what they say, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

_NEEDED = {"num_hidden_layers", "num_attention_heads", "hidden_size"}
_NEEDED |= {"max_position_embeddings", "rms_norm_eps"}
_LAYER = [f"self_attn.{name}_proj" for name in "qkvo"]
_LAYER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_LAYER += ["input_layernorm", "post_attention_layernorm"]


@dataclass(frozen=True)
class LlamaConfig:
    """What of a Llama's ``config.json`` the forward pass needs."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    max_model_len: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float
    tied: bool
    eos_tokens: frozenset[int]

    @classmethod
    def of(cls, config: dict[str, Any]) -> LlamaConfig:
        """Read a ``config.json``; raises ValueError for a model that is computed otherwise."""
        missing = _NEEDED - config.keys()
        if config.get("model_type") != "llama" or config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"this is a {config.get('model_type')!r} model; only Llama's is here")
        if missing:
            raise ValueError(f"config.json has no {', '.join(sorted(missing))}")
        for name in ("attention_bias", "mlp_bias", "quantization_config"):
            if config.get(name):
                raise ValueError(f"a model with {name} is not here")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear") or rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"rotary embedding with {rope} is not here")
        heads = config["num_attention_heads"]
        eos = config.get("eos_token_id")
        return cls(
            num_layers=config["num_hidden_layers"],
            num_query_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            max_model_len=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10_000.0),
            rope_factor=rope["factor"] if kind == "linear" else 1.0,
            tied=config.get("tie_word_embeddings", False),
            eos_tokens=frozenset([eos] if isinstance(eos, int) else eos or ()),
        )

    def weight_names(self) -> list[str]:
        """Return the names of all weights that the forward pass reads."""
        layers = [f"model.layers.{i}.{part}" for i in range(self.num_layers) for part in _LAYER]
        head = [] if self.tied else ["lm_head"]
        return [f"{n}.weight" for n in ("model.embed_tokens", *layers, "model.norm", *head)]


def read_folder(folder: Path, device: torch.device | str) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Read ``config.json``, ``generation_config.json`` where there is one, ``*.safetensors``.

    Args:
        folder: as transformers' `save_pretrained` writes it.
        device: where the weights go.

    Returns:
        The configuration, and the weights by name in the dtype that they are stored in.

    Raises:
        OSError: a file cannot be read.
        ValueError: the model is computed otherwise, or the folder is not whole.

    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    described = _read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():  # a chat model has more end tokens here
        ends = _read_json(folder / "generation_config.json").get("eos_token_id")
        described |= {} if ends is None else {"eos_token_id": ends}
    config = LlamaConfig.of(described)
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            weights |= load_file(path, device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    for name in config.weight_names():
        if name not in weights:
            raise ValueError(f"the *.safetensors of {folder} have no {name}")
    return config, weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise ValueError(f"{path} holds no JSON object")
    return described
