#!/usr/bin/env python3
"""A Llama model on a paged KV cache: the whole way from prompts to answers, greedy.

    python tools/fetch_model.py
    python examples/llama.py "The capital of France is" "Paging is to memory what"

Everything that PagedAttention is about is in `generate` and `next_tokens`: the block manager says
where tokens go, the page table says it to the GPU, and in `Llama.forward` `rotary_write_kv` and
`attention` do it. The rest is a plain decoder (RMSNorm, grouped-query attention, SwiGLU) in the
arithmetic of transformers' `LlamaForCausalLM`, so that its greedy answers can be compared token by
token. `llama_folder.py` reads the model's files.

Prompts of different lengths are one batch without padding: their tokens lie one after the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from llama_folder import LlamaConfig, read_folder
from torch.nn.functional import embedding, linear, silu

if importlib.util.find_spec("pagedattn") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pagedattn import BlockManager, KVCache, PageTable
from pagedattn.attention import (
    AttentionBatch,
    Rotary,
    attention,
    implementation_names,
    rotary_write_kv,
)
from pagedattn.report.text import clean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

SMOLLM2 = Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct"


class Llama:
    """Weights and a forward pass over a batch of ragged sequences."""

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.embeddings = weights["model.embed_tokens.weight"]
        self.head = self.embeddings if config.tied else weights["lm_head.weight"]
        steps = torch.arange(0, config.head_size, 2, dtype=torch.int64).float()
        rates = 1.0 / config.rope_theta ** (steps / config.head_size)
        rates = (rates / config.rope_factor).to(self.embeddings.device)
        self.rotary = Rotary.of(rates, config.max_model_len)

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Llama:
        """Read a Hugging Face folder; raises OSError or ValueError as `read_folder` does."""
        config, weights = read_folder(folder, device)
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
        for index in range(config.num_layers):
            layer = f"model.layers.{index}."
            normed = self._norm(hidden, layer + "input_layernorm")
            query, key, value = (
                linear(normed, weights[f"{layer}self_attn.{name}_proj.weight"]).unflatten(
                    -1, (-1, config.head_size)
                )
                for name in "qkv"
            )
            held = cache.layer(index)
            rotary_write_kv(
                *(query, key, value, held, batch.slots, positions, self.rotary),
                out=query,
                implementation=implementation,
            )
            seen = attention(query, held, batch, implementation=implementation)
            hidden = hidden + linear(seen.flatten(1), weights[layer + "self_attn.o_proj.weight"])
            normed = self._norm(hidden, layer + "post_attention_layernorm")
            gate, up = (
                linear(normed, weights[f"{layer}mlp.{n}_proj.weight"]) for n in ("gate", "up")
            )
            hidden = hidden + linear(silu(gate) * up, weights[layer + "mlp.down_proj.weight"])
        last = self._norm(hidden[batch.query_starts[1:].long() - 1], "model.norm")
        return linear(last, self.head)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        """RMSNorm, in float32, rounded before it is scaled."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self.weights[name + ".weight"] * wide.to(hidden.dtype)


@dataclass(frozen=True)
class Memory:
    """A pool's bookkeeping and its contents, which belong together.

    The manager finds what earlier prompts left in the cache, so neither is of use with another.
    """

    manager: BlockManager
    cache: KVCache

    @classmethod
    def of(cls, model: Llama, manager: BlockManager) -> Memory:
        """Make the cache for a manager that has given out no blocks yet."""
        cache = KVCache(
            num_layers=model.config.num_layers,
            num_blocks=manager.num_blocks,
            block_size=manager.block_size,
            num_kv_heads=model.config.num_kv_heads,
            head_size=model.config.head_size,
            dtype=model.dtype,
            device=model.device,
        )
        return cls(manager, cache)


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    memory: Memory | None = None,
    implementation: str | None = None,
    stop_at_eos: bool = True,
) -> list[list[int]]:
    """Answer all prompts in one batch, each token the most likely one.

    Args:
        model: the weights.
        prompts: token ids, at least 1 each.
        max_new_tokens: of each answer, at least 1.
        memory: whose blocks are used; by default a pool that just fits, in blocks of 16.
        implementation: of attention, by name; None chooses.
        stop_at_eos: whether an answer ends with the model's end token.

    Returns:
        The new tokens of each prompt. The blocks are free again, also when this raises.

    Raises:
        ValueError: a prompt is empty, or it and its answer are longer than the model allows.
        OutOfBlocksError: the memory is too small.

    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    longest = lengths.max(initial=0) + max_new_tokens
    if not lengths.all() or not lengths.size or max_new_tokens < 1:
        raise ValueError("a prompt and its answer must have at least 1 token each")
    if longest > model.config.max_model_len:
        raise ValueError(
            f"a prompt and its answer have {longest} tokens; "
            f"the model allows {model.config.max_model_len}"
        )
    if memory is None:  # the last token of an answer is never read, so it needs no slot
        blocks = -(-(lengths + max_new_tokens - 1) // 16)
        memory = Memory.of(model, BlockManager(num_blocks=int(blocks.sum()), block_size=16))
    manager = memory.manager
    admission = manager.admit([np.asarray(prompt) for prompt in prompts])  # blocks for the prompts
    ids, running = admission.sequence_ids, np.arange(len(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    try:
        # of a prompt whose beginning another brought, only the rest is computed
        counts = lengths - admission.num_cached_tokens
        tokens = np.concatenate([np.asarray(p)[-n:] for p, n in zip(prompts, counts, strict=True)])
        while running.size:
            tokens = next_tokens(model, memory, ids[running], tokens, counts, implementation)
            for number, token in zip(running.tolist(), tokens.tolist(), strict=True):
                answers[number].append(token)
            ended = np.full(running.size, len(answers[running[0]]) == max_new_tokens)
            if stop_at_eos:
                ended |= np.isin(tokens, list(model.config.eos_tokens))
            manager.free(ids[running[ended]])  # their blocks serve the others
            running, tokens = running[~ended], tokens[~ended]
            if running.size:  # room for one more token each
                memory.cache.copy_blocks(manager.append(ids[running], token_ids=tokens))
            counts = np.ones(running.size, np.int64)
    except BaseException:
        manager.reset_prefix_cache()  # later prompts must not find blocks that were not written
        raise
    finally:
        manager.free(ids[running])
    return answers


def next_tokens(
    model: Llama,
    memory: Memory,
    ids: NDArray[np.int64],
    tokens: NDArray[np.int64],
    counts: NDArray[np.int64],
    implementation: str | None = None,
) -> NDArray[np.int64]:
    """Take one step: compute the tokens that are new, and choose what follows each sequence.

    Args:
        model: the weights.
        memory: has room for the new tokens; their K and V are written.
        ids: int64 [num_sequences].
        tokens: int64 [sum of counts], each sequence's new tokens, sequence after sequence.
        counts: int64 [num_sequences], how many they are: the prompt's, later 1.
        implementation: of attention, by name; None chooses.

    """
    table = PageTable.of(memory.manager, ids)  # logical to physical
    batch = AttentionBatch.of(table, counts, model.device)  # and the slots of the new tokens
    # new token t of all is token t + num_tokens - end of its sequence, whose new ones end at `end`
    positions = np.arange(tokens.size) + np.repeat(table.num_tokens - np.cumsum(counts), counts)
    logits = model.forward(
        torch.from_numpy(tokens).to(model.device),
        torch.from_numpy(positions).to(model.device),
        memory.cache,
        batch,
        implementation,
    )
    return logits.argmax(-1).cpu().numpy()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows what is allowed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one sentence on stderr."""
    try:
        for text in answer(arguments):
            print(text, end="\n\n")
    except (ImportError, OSError, ValueError, torch.OutOfMemoryError) as error:
        hint = "; README.md says what to install" if isinstance(error, ImportError) else ""
        print(f"{clean(str(error)).rstrip('.')}{hint}.", file=sys.stderr)
        return 2
    return 0


def answer(arguments: Sequence[str] | None) -> list[str]:
    """Answer the prompts of the command line; each string is a prompt, a bar and its answer."""
    parser = _Parser(description="Answer prompts with a Llama on a paged KV cache.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--model", type=Path, default=SMOLLM2, metavar="FOLDER")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the folder's")
    parser.add_argument("--implementation", choices=implementation_names(), help="of attention")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.implementation == "triton" and device == "cpu":
        raise ValueError("the implementation triton needs a CUDA GPU, and torch sees none")
    if not (options.model / "config.json").is_file():
        raise ValueError(f"{options.model} holds no model: python tools/fetch_model.py makes one")
    from transformers import AutoTokenizer

    dtype = getattr(torch, options.dtype) if options.dtype else None
    model = Llama.load(options.model, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [tokenizer.encode(prompt) for prompt in options.prompts]
    answers = generate(
        model, prompts, options.max_new_tokens, implementation=options.implementation
    )
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    return [f"{prompt}|{text}" for prompt, text in zip(options.prompts, texts, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
