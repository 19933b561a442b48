"""What is calculated: GPU, model, cache and requests, checked against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedattn.config import ConfigError, positive_int
from pagedattn.hardware import GIB

if TYPE_CHECKING:
    from pagedattn.calculator.workload import Workload
    from pagedattn.config import ModelConfig
    from pagedattn.hardware import GPU
    from pagedattn.memory import KVMemory

_MOST_PROMPT_TOKENS = 10_000_000  # seconds, not minutes, and hundreds of megabytes


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory of one GPU that is left for K and V.

    ``num_slots`` is the tokens that fit without blocks, ``num_blocks`` the whole blocks of all
    layers. ``formula`` says where ``num_bytes`` comes from.
    """

    name: str
    num_bytes: int
    num_slots: int
    num_blocks: int
    block_size: int
    formula: str

    @property
    def num_tokens(self) -> int:
        """Tokens that the blocks hold: what vLLM prints as the size of its KV cache."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True)
class Settings:
    """A calculation, before it is done.

    ``memory`` has model, block size, cache dtype and parallelism. ``utilization`` is the share of
    the GPU's memory that may be used. ``kv_bytes``, where given, is the KV cache's memory itself,
    and ``weight_bytes`` that of the weights on one GPU. ``waste_requests`` fill part 1's memory
    and ``user_requests`` part 2's. Raises :class:`pagedattn.config.ConfigError`.
    """

    gpu: GPU
    memory: KVMemory
    max_model_len: int
    utilization: float
    waste_requests: Workload
    user_requests: Workload
    num_users: int
    system_prompt_tokens: int
    own_tokens: int
    seed: int
    kv_bytes: int | None = None
    weight_bytes: int | None = None

    def __post_init__(self) -> None:
        for key in ("max_model_len", "num_users", "system_prompt_tokens", "own_tokens"):
            positive_int(_FLAGS[key], getattr(self, key))
        check_max_model_len(self.model, self.max_model_len)
        if not 0 < self.utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization must be above 0 and at most 1, not {self.utilization:g}."
            )
        prompt = self.system_prompt_tokens + self.own_tokens
        if prompt > self.max_model_len:
            raise ConfigError(
                f"--system-prompt-tokens and --own-tokens must be at most {self.max_model_len} "
                f"together, the longest request, not {prompt}."
            )
        if prompt * self.num_users > _MOST_PROMPT_TOKENS:
            raise ConfigError(
                f"--users must be at most {_MOST_PROMPT_TOKENS // prompt} with prompts of {prompt} "
                f"tokens, not {self.num_users}."
            )
        whole = self.budgets[0]
        if not self._holds_one(whole):
            raise ConfigError(
                f"the KV cache must hold a request of {self.max_model_len} tokens, "
                f"{gib_text(self._longest_bytes)}, but has {gib_text(whole.num_bytes)}: take a "
                f"larger GPU, a smaller model or a smaller --max-model-len."
            )

    @property
    def model(self) -> ModelConfig:
        """The model whose K and V are kept."""
        return self.memory.model

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Memory for K and V: all that may be used, then what the weights leave of it.

        The second is absent where the weights are not known or leave less than a request of the
        maximum length needs, or where ``kv_bytes`` was given.
        """
        if self.kv_bytes is not None:
            return (self._budget("given", self.kv_bytes, "--kv-memory"),)
        usable = math.floor(self.utilization * self.gpu.memory_bytes)
        share = f"{100 * self.utilization:g} % of {gib_text(self.gpu.memory_bytes)}"
        budgets = [self._budget("without-weights", usable, share)]
        weights = self.weights_on_gpu
        if weights is not None and weights < usable:
            rest = self._budget(
                "after-weights", usable - weights, f"{share} - {gib_text(weights)} of weights"
            )
            if self._holds_one(rest):
                budgets.append(rest)
        return tuple(budgets)

    @property
    def weights_on_gpu(self) -> int | None:
        """Bytes of weights on one GPU, or ``None`` where they are not known."""
        return self.memory.weight_bytes if self.weight_bytes is None else self.weight_bytes

    @property
    def _longest_bytes(self) -> int:
        return self.memory.bytes_of(self.max_model_len)

    def _holds_one(self, budget: Budget) -> bool:
        """Whether a request of the maximum length fits, blocks outside windows given back."""
        return self._longest_bytes + self.memory.scale_bytes <= budget.num_bytes

    def _budget(self, name: str, num_bytes: int, formula: str) -> Budget:
        memory = self.memory
        return Budget(
            name=name,
            num_bytes=num_bytes,
            num_slots=max(0, num_bytes - memory.scale_bytes) // memory.bytes_per_token,
            num_blocks=memory.num_blocks_in(num_bytes),
            block_size=memory.block_size,
            formula=formula,
        )


def check_max_model_len(model: ModelConfig, max_model_len: int) -> None:
    """Raise :class:`ConfigError` unless requests of so many tokens are possible."""
    if not 2 <= max_model_len <= model.max_model_len:
        raise ConfigError(
            f"--max-model-len must be 2 to {model.max_model_len}, the maximum of {model.name}, "
            f"not {max_model_len}."
        )


def gib_text(num_bytes: float) -> str:
    """Return ``25.60 GiB``, or MiB below one; whole numbers without decimals."""
    size, unit = (num_bytes / GIB, "GiB") if num_bytes >= GIB else (num_bytes / 2**20, "MiB")
    return f"{size:.0f} {unit}" if size == round(size) else f"{size:.2f} {unit}"


def percent(share: float) -> str:
    """Return ``80.8 %``."""
    return f"{100 * share:.1f} %"


_FLAGS = {
    "max_model_len": "--max-model-len",
    "num_users": "--users",
    "system_prompt_tokens": "--system-prompt-tokens",
    "own_tokens": "--own-tokens",
}
