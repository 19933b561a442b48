#!/usr/bin/env python3
"""A Llama model on a paged KV cache: the whole way from prompts to answers, greedy.

    python tools/fetch_model.py
    python examples/llama.py "The capital of France is" "Paging is to memory what"

Everything that PagedAttention is about is in `generate`: the block manager says where tokens go,
the page table says it to the GPU, `write_kv` and `attention` do it. The rest is a plain decoder
(RMSNorm, rotary embedding, grouped-query attention, SwiGLU) in the arithmetic of transformers'
`LlamaForCausalLM`, so that its greedy answers can be compared token by token.

Prompts of different lengths are one batch without padding: their tokens lie one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import embedding, linear, silu

from pagedattn import BlockManager, KVCache, PageTable
from pagedattn.attention import AttentionBatch, attention, write_kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


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
    eos_tokens: frozenset[int]

    @classmethod
    def of(cls, config: dict[str, Any]) -> LlamaConfig:
        """Read a ``config.json``; raises ValueError for a model that is computed otherwise."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if config.get("model_type") != "llama" or config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"this is a {config.get('model_type')!r} model; only Llama's is here")
        if kind != "default" or config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError(f"rotary embedding of type {kind!r} or biases are not here")
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
            eos_tokens=frozenset([eos] if isinstance(eos, int) else eos or ()),
        )


class Llama:
    """Weights and a forward pass over a batch of ragged sequences."""

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.embeddings = weights["model.embed_tokens.weight"]
        steps = torch.arange(0, config.head_size, 2, dtype=torch.int64).float()
        rates = 1.0 / config.rope_theta ** (steps / config.head_size)
        self.rates = rates.to(self.embeddings.device)

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Llama:
        """Read a Hugging Face folder: ``config.json`` and ``*.safetensors``."""
        from safetensors.torch import load_file

        config = LlamaConfig.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path, device=str(device))
        return cls(config, {name: weight.to(dtype) for name, weight in weights.items()})

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and the KV cache."""
        return self.embeddings.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.device

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        implementation: str | None = None,
    ) -> Tensor:
        """Compute the logits of each sequence's last token; writes K and V into the cache.

        Args:
            tokens: int64 [num_query_tokens], sequence after sequence.
            positions: int64 [num_query_tokens], each token's place in its sequence.
            cache: of this model's layers.
            batch: where the tokens' K and V go, and what each token sees.
            implementation: of attention, by name; None chooses.

        Returns:
            [num_sequences, vocab_size].

        """
        config, weights = self.config, self.weights
        hidden = embedding(tokens, self.embeddings)
        cos, sin = self._rotations(positions)
        for index in range(config.num_layers):
            layer = f"model.layers.{index}."
            normed = self._norm(hidden, layer + "input_layernorm")
            query, key, value = (
                linear(normed, weights[f"{layer}self_attn.{name}_proj.weight"]).unflatten(
                    -1, (-1, config.head_size)
                )
                for name in "qkv"
            )
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            write_kv(key, value, cache.layer(index), batch.slots, implementation=implementation)
            seen = attention(query, cache.layer(index), batch, implementation=implementation)
            hidden = hidden + linear(seen.flatten(1), weights[layer + "self_attn.o_proj.weight"])
            normed = self._norm(hidden, layer + "post_attention_layernorm")
            gate, up = (
                linear(normed, weights[f"{layer}mlp.{n}_proj.weight"]) for n in ("gate", "up")
            )
            hidden = hidden + linear(silu(gate) * up, weights[layer + "mlp.down_proj.weight"])
        last = self._norm(hidden[batch.query_starts[1:].long() - 1], "model.norm")
        return linear(last, weights.get("lm_head.weight", self.embeddings))

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        """RMSNorm, in float32, rounded before it is scaled."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self.weights[name + ".weight"] * wide.to(hidden.dtype)

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [num_query_tokens, 1, head_size], computed in float32."""
        angles = positions.float()[:, None] * self.rates
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [num_query_tokens, num_heads, head_size], halves paired."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    manager: BlockManager | None = None,
    implementation: str | None = None,
    stop_at_eos: bool = True,
) -> list[list[int]]:
    """Answer all prompts in one batch, each token the most likely one.

    Args:
        model: the weights.
        prompts: token ids, at least 1 each.
        max_new_tokens: of each answer, at least 1.
        manager: whose blocks are used, empty and large enough; by default one that just fits.
        implementation: of attention, by name; None chooses.
        stop_at_eos: whether an answer ends with the model's end token.

    Returns:
        The new tokens of each prompt. The manager's blocks are free again.

    """
    config = model.config
    if manager is None:
        blocks = sum(-(-(len(prompt) + max_new_tokens) // 16) for prompt in prompts)
        manager = BlockManager(num_blocks=blocks, block_size=16)
    cache = KVCache(
        num_layers=config.num_layers,
        num_blocks=manager.num_blocks,
        block_size=manager.block_size,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=model.dtype,
        device=model.device,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    admission = manager.admit([np.asarray(prompt) for prompt in prompts])  # blocks for the prompts
    ids = admission.sequence_ids
    running = np.arange(len(prompts))
    # of a prompt whose beginning another brought, only the rest is computed
    counts = np.array([len(prompt) for prompt in prompts]) - admission.num_cached_tokens
    inputs = np.concatenate([np.asarray(p)[-n:] for p, n in zip(prompts, counts, strict=True)])
    while running.size:
        table = PageTable.of(manager, ids[running])  # logical to physical
        batch = AttentionBatch.of(table, counts, model.device)  # and the slots of the new tokens
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        first = np.repeat(table.num_tokens - counts, counts)
        positions = first + np.arange(inputs.size) - starts
        logits = model.forward(
            torch.from_numpy(inputs).to(model.device),
            torch.from_numpy(positions).to(model.device),
            cache,
            batch,
            implementation,
        )
        inputs = logits.argmax(-1).cpu().numpy()
        for number, token in zip(running.tolist(), inputs.tolist(), strict=True):
            answers[number].append(token)
        ended = np.array(
            [
                len(answers[number]) == max_new_tokens
                or (stop_at_eos and answers[number][-1] in config.eos_tokens)
                for number in running.tolist()
            ]
        )
        manager.free(ids[running[ended]])  # their blocks serve the others
        running, inputs = running[~ended], inputs[~ended]
        counts = np.ones(running.size, dtype=np.int64)
        if running.size:
            cache.copy_blocks(manager.append(ids[running], token_ids=inputs))  # room for one more
    return answers


def main() -> int:
    """Answer the prompts of the command line."""
    parser = argparse.ArgumentParser(description="Answer prompts with a Llama on a paged KV cache.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", metavar="FOLDER"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        print(
            f"{options.model} holds no model: python tools/fetch_model.py makes one.",
            file=sys.stderr,
        )
        return 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = Llama.load(options.model, device="cuda" if torch.cuda.is_available() else "cpu")
    prompts = [tokenizer.encode(prompt) for prompt in options.prompts]
    for prompt, answer in zip(
        options.prompts, generate(model, prompts, options.max_new_tokens), strict=True
    ):
        print(f"{prompt}|{tokenizer.decode(answer, skip_special_tokens=True)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
