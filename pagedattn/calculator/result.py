"""A whole calculation, and its JSON.

``python tools/paged_attention_benchmark.py --json FILE`` writes an object with these keys; bytes
are of one GPU, shares are fractions of 1, and what could not be calculated is null:

- ``schema``: ``"pagedattn-calculator-1"``; ``version``: the library's;
- ``settings``: ``gpu`` (``name``, ``memory_bytes``, ``bandwidth`` in bytes/s, ``flops``),
  ``model``, ``dtype``, ``max_model_len``, ``block_size``, ``kv_dtype``, ``kv_scales``,
  ``tensor_parallel_size``, ``gpu_memory_utilization``, ``workload``, ``num_lengths`` (of it, which
  requests are drawn from), ``num_cut`` (how many of those are longer than ``max_model_len`` and cut
  to fit: by part, ``waste`` and ``users``), ``users``, ``system_prompt_tokens``, ``own_tokens``,
  ``seed``;
- ``memory``: ``bytes_per_token``, ``bytes_per_block``, ``scale_bytes``, ``kv_heads_per_gpu``,
  ``layer_groups`` (``num_layers`` and ``window`` or null), ``num_layers_without_kv``,
  ``num_parameters``, ``parameters_are_estimated``, ``weight_bytes``, and ``budgets``, each with
  ``name`` (``without-weights``, ``after-weights`` or ``given``), ``num_bytes``, ``num_slots``
  (tokens without blocks), ``num_blocks``, ``num_tokens`` (of whole blocks) and ``formula``;
- ``waste``: ``num_slots``, ``mean_tokens``, ``formulas``, and ``systems``, each with ``system``,
  ``num_fillings``, ``num_requests``, ``held_tokens``, ``shares`` (``token_states``,
  ``reservation``, ``internal``, ``external``, ``free``), ``waste``, ``waste_of_reserved`` and
  ``reason`` (why it holds no request, or null);
- ``users``: ``mean_tokens``, ``formulas``, ``no_run`` (why nothing was run, or null), and
  ``systems``, each with ``system``, ``users`` (by budget name), and of the run ``num_requests``,
  ``mean_running``, ``tokens_per_s`` and ``num_preempted``;
- ``sharing``: ``by_users`` and ``by_block_size``, lists of ``num_users``, ``block_size``,
  ``separate`` and ``shared`` (blocks) and ``saved``; ``bytes_per_block``, ``saved_tokens``,
  ``formulas``;
- ``headline``: ``waste_standard`` (of what is reserved), ``waste_paged`` (of the whole memory),
  ``users_standard``, ``users_paged``, ``saved_tokens``, ``saved_blocks``: the numbers of the three
  parts, under the first budget;
- ``notes``: sentences on what these numbers leave out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagedattn.calculator.settings import Budget, Settings, gib_text
from pagedattn.calculator.sharing import SharedBlocks, Sharing, calculate_sharing
from pagedattn.calculator.users import BUS_BANDWIDTH, WATERMARK, WINDOWS, Users, calculate_users
from pagedattn.calculator.waste import PAGED, STANDARD, Waste, calculate_waste

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMA = "pagedattn-calculator-1"


@dataclass(frozen=True)
class Calculation:
    """Settings and the results of the three parts."""

    settings: Settings
    waste: Waste
    users: Users
    sharing: Sharing

    @classmethod
    def of(cls, settings: Settings, progress: Callable[[str], None]) -> Calculation:
        """Calculate all three parts; ``progress`` is told what is being done."""
        return cls(
            settings,
            calculate_waste(settings, progress),
            calculate_users(settings, progress),
            calculate_sharing(settings, progress),
        )

    @property
    def headline(self) -> dict[str, float | None]:
        """The numbers of the three parts, under the first budget."""
        budget = self.settings.budgets[0].name
        return {
            "waste_standard": self.waste.of(STANDARD).waste_of_reserved,
            "waste_paged": self.waste.of(PAGED).waste,
            "users_standard": self.users.of(STANDARD).users[budget],
            "users_paged": self.users.of(PAGED).users[budget],
            "saved_tokens": self.sharing.saved_tokens,
            "saved_blocks": self.sharing.total.saved,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what these numbers leave out."""
        return tuple(_notes(self))

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` writes; this module says its shape."""
        from pagedattn import __version__

        sharing = dataclasses.asdict(self.sharing)
        for key in ("by_users", "by_block_size"):
            sharing[key] = [_blocks(blocks) for blocks in getattr(self.sharing, key)]
        return {
            "schema": SCHEMA,
            "version": __version__,
            "settings": _settings(self.settings),
            "memory": _memory(self.settings),
            "waste": dataclasses.asdict(self.waste),
            "users": dataclasses.asdict(self.users),
            "sharing": sharing,
            "headline": self.headline,
            "notes": list(self.notes),
        }


def _blocks(blocks: SharedBlocks) -> dict[str, Any]:
    return {**dataclasses.asdict(blocks), "saved": blocks.saved}


def _settings(settings: Settings) -> dict[str, Any]:
    memory = settings.memory
    return {
        "gpu": dataclasses.asdict(settings.gpu),
        "model": settings.model.name,
        "dtype": settings.model.dtype,
        "max_model_len": settings.max_model_len,
        "block_size": memory.block_size,
        "kv_dtype": memory.dtype,
        "kv_scales": memory.scales,
        "tensor_parallel_size": memory.tensor_parallel_size,
        "gpu_memory_utilization": settings.utilization,
        "workload": settings.waste_requests.name,
        "num_lengths": settings.waste_requests.prompts.size,
        "num_cut": {
            "waste": settings.waste_requests.num_cut,
            "users": settings.user_requests.num_cut,
        },
        "users": settings.num_users,
        "system_prompt_tokens": settings.system_prompt_tokens,
        "own_tokens": settings.own_tokens,
        "seed": settings.seed,
    }


def _memory(settings: Settings) -> dict[str, Any]:
    memory, model = settings.memory, settings.model
    return {
        "bytes_per_token": memory.bytes_per_token,
        "bytes_per_block": memory.bytes_per_block,
        "scale_bytes": memory.scale_bytes,
        "kv_heads_per_gpu": memory.kv_heads_per_gpu,
        "layer_groups": [dataclasses.asdict(group) for group in model.layer_groups],
        "num_layers_without_kv": model.num_layers - model.num_kv_layers,
        "num_parameters": model.num_parameters,
        "parameters_are_estimated": model.parameters_are_estimated,
        "weight_bytes": settings.weights_on_gpu,
        "budgets": [_budget(budget) for budget in settings.budgets],
    }


def _budget(budget: Budget) -> dict[str, Any]:
    return {**dataclasses.asdict(budget), "num_tokens": budget.num_tokens}


def _notes(result: Calculation) -> list[str]:
    settings, model = result.settings, result.settings.model
    notes = [
        (
            f"A running request holds {result.waste.mean_tokens:.0f} tokens on average in part 1 "
            f"and {result.users.mean_tokens:.0f} in part 2; --mean-tokens and --user-tokens change "
            "that."
        ),
        (
            "Of kept slots, tokens hold one; later tokens will, if the answer gets there, the end "
            "of a last block among them; internal never will; external are too few together, or "
            f"kept back, as {100 * WATERMARK:g} % of a paged pool is so that running requests can "
            "grow."
        ),
        (
            "Activations, CUDA graphs and the allocator's own losses are not subtracted: a serving "
            "system measures them at its start, and has that much less."
        ),
        (
            "flexgen counts host memory of 4 times the GPU's, which every step pays for on a bus "
            f"of {BUS_BANDWIDTH / 1e9:g} GB/s."
        ),
    ]
    if settings.kv_bytes is None:
        notes += _weight_notes(settings)
    if model.parameters_are_estimated and settings.weight_bytes is None:
        notes.append(
            f"The {model.num_parameters:,} parameters of {model.name} are an estimate from its "
            "config."
        )
    without = model.num_layers - model.num_kv_layers
    if without:
        notes.append(
            f"{without} of {model.num_layers} layers keep no K and V of their own; a state of "
            "fixed size that they may keep for each request is not counted."
        )
    if any(row.system == WINDOWS for row in result.users.systems):
        notes.append(
            f"Layers with a window are counted as such in {WINDOWS} alone; everywhere else all "
            "layers keep all tokens."
        )
    if settings.memory.kv_heads_per_gpu * settings.memory.tensor_parallel_size > model.num_kv_heads:
        notes.append(
            f"{settings.memory.tensor_parallel_size} GPUs share {model.num_kv_heads} KV heads: "
            "each keeps one, and several keep the same."
        )
    if result.users.no_run is None:
        notes.append(
            "Tokens a second are a bound: a step takes as long as reading the weights and all K "
            "and V once and multiplying, and the host takes no time."
        )
    return notes


def _weight_notes(settings: Settings) -> list[str]:
    weights, model = settings.weights_on_gpu, settings.model
    usable = settings.budgets[0]
    if weights is None:
        return [
            (
                f"The weights of {model.name} are not known, so they are not subtracted; --weights "
                "gives them."
            )
        ]
    if len(settings.budgets) == 1:
        return [
            (
                f"The weights take {gib_text(weights)} of a GPU, and {usable.formula} are "
                f"{gib_text(usable.num_bytes)}: they leave no room for a request of the maximum "
                "length; more GPUs (--tensor-parallel-size) or a larger one would."
            )
        ]
    return [
        (
            f"without-weights gives K and V all {gib_text(usable.num_bytes)}, as if the weights "
            "were elsewhere: the tutorial's headline; after-weights is what one such GPU has."
        )
    ]
