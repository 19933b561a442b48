"""A calculation as text for a terminal: tables, with the formulas beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedattn.calculator.settings import gib_text, percent
from pagedattn.calculator.waste import PAGED, STANDARD
from pagedattn.hardware import GIB
from pagedattn.report.tables import Table
from pagedattn.report.text import MISSING, clean, number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagedattn.calculator.result import Calculation
    from pagedattn.calculator.workload import Workload

_CAUSES = {
    "token_states": "tokens",
    "reservation": "later tokens",
    "internal": "internal",
    "external": "external",
}


def as_text(result: Calculation) -> str:
    """Return the whole calculation as text."""
    parts = [_memory(result), _waste(result), _users(result), _sharing(result), _headline(result)]
    return "\n\n".join(parts)


def _memory(result: Calculation) -> str:
    settings, model = result.settings, result.settings.model
    memory = settings.memory
    item = f"{model.head_size} x {memory.item_bytes} bytes"
    if memory.scales == "per-token-head":
        item = f"({item} + 4 of scale)"
    lines = [
        f"{clean(model.name)} on {settings.gpu.name}"
        + (f" x {memory.tensor_parallel_size}" if memory.tensor_parallel_size > 1 else ""),
        (
            f"K and V of a token: 2 x {model.num_kv_layers} layers x "
            f"{memory.kv_heads_per_gpu} heads x {item} = {memory.bytes_per_token:,} bytes "
            f"({memory.dtype})"
        ),
    ]
    table = Table(
        "KV memory",
        ["budget", "where from", "GiB", f"blocks of {memory.block_size}", "tokens"],
        [
            [
                budget.name,
                budget.formula,
                f"{budget.num_bytes / GIB:.2f}",
                f"{budget.num_blocks:,}",
                f"{budget.num_tokens:,}",
            ]
            for budget in settings.budgets
        ],
        2,
    )
    return "\n".join([*lines, "", table.as_text()])


def _waste(result: Calculation) -> str:
    waste = result.waste
    lines, reasons = [], []
    for row in waste.systems:
        if row.reason is not None:
            lines.append([row.system, *[MISSING] * 7])
            reasons.append(f"{row.system}: {row.reason}")
            continue
        shares = [percent(row.shares[cause]) for cause in _CAUSES]
        total = [_percent(row.waste), _percent(row.waste_of_reserved)]
        lines.append([row.system, f"{row.num_requests:.1f}", *shares, *total])
    table = Table(
        f"1. Requests of different lengths ({_described(result.settings.waste_requests)}): "
        f"{waste.num_slots:,} slots while one more waits",
        ["system", "requests", *_CAUSES.values(), "waste", "waste of what is kept"],
        lines,
        1,
    )
    return _with(table, [*waste.formulas, *reasons], _not_zero(result))


def _described(requests: Workload) -> str:
    """Say what requests are drawn from, and how many of those do not fit as they are."""
    parts = [requests.name, f"{requests.mean_tokens:.0f} tokens held on average"]
    if requests.num_cut:
        total, most = requests.prompts.size, requests.max_model_len
        parts.insert(1, f"{requests.num_cut:,} of {total:,} cut to fit {most} tokens")
    return ", ".join(parts)


def _not_zero(result: Calculation) -> Iterable[str]:
    paged = result.waste.of("paged")
    if paged.waste is not None:
        yield (
            f"Paged waste is sometimes printed as 0 %. That is a rounding: each request's last "
            f"block is part empty, and what is left when the next request does not fit is lost. "
            f"Here it is {percent(paged.waste)} of the memory."
        )


def _users(result: Calculation) -> str:
    users, budgets = result.users, result.settings.budgets
    ran = users.no_run is None
    lines = []
    for row in users.systems:
        fits = [_one(row.users[budget.name]) for budget in budgets]
        run = [_one(row.mean_running), number(row.tokens_per_s)] if ran else []
        lines.append([row.system, *fits, *run])
    table = Table(
        f"2. Users that fit ({_described(result.settings.user_requests)})",
        ["system", *(f"users, {budget.name}" for budget in budgets)]
        + (["running", "tokens/s at most"] if ran else []),
        lines,
        1,
    )
    run_line = (
        f"The last two columns: a queue of requests served in the memory {budgets[-1].name}; "
        f"running is the mean of a step while requests wait."
        if ran
        else f"No throughput: {users.no_run}."
    )
    return _with(table, users.formulas, [run_line])


def _sharing(result: Calculation) -> str:
    sharing, settings = result.sharing, result.settings
    table = Table(
        f"3. A shared prompt: {settings.num_users} users, {settings.system_prompt_tokens} tokens "
        f"shared, {settings.own_tokens} of each one's own",
        ["block size", "blocks alone", "blocks shared", "GiB alone", "GiB shared", "saved"],
        [
            [
                str(row.block_size),
                f"{row.separate:,}",
                f"{row.shared:,}",
                *(
                    f"{blocks * row.block_size * settings.memory.bytes_per_token / GIB:.2f}"
                    for blocks in (row.separate, row.shared)
                ),
                percent(row.saved),
            ]
            for row in sharing.by_block_size
        ],
        0,
    )
    return _with(table, sharing.formulas, [])


def _headline(result: Calculation) -> str:
    numbers = result.headline
    standard, paged = numbers["users_standard"], numbers["users_paged"]
    lines = [
        "In short",
        _short_waste(result),
        (
            f"users in {gib_text(result.settings.budgets[0].num_bytes)}: {_one(standard)} "
            f"standard, {_one(paged)} paged{_short_after_weights(result)}"
        ),
        (
            f"a shared prompt saves {_percent(numbers['saved_tokens'])} of the tokens, "
            f"{_percent(numbers['saved_blocks'])} in blocks of {result.settings.memory.block_size}"
        ),
        "",
        *(f"- {note}" for note in result.notes),
    ]
    return "\n".join(lines)


def _short_waste(result: Calculation) -> str:
    """Say both systems' waste on both grounds: of what is kept for requests, and of all memory."""
    standard, paged = result.waste.of(STANDARD), result.waste.of(PAGED)
    return (
        f"waste: {_percent(standard.waste_of_reserved)} of what a standard reservation keeps, "
        f"{_percent(paged.waste_of_reserved)} of what a paged one does; of all memory "
        f"{_percent(standard.waste)} and {_percent(paged.waste)}"
    )


def _short_after_weights(result: Calculation) -> str:
    """Say how many users are left where the weights take their part of the same memory."""
    settings, users = result.settings, result.users
    weights, budgets = settings.weights_on_gpu, settings.budgets
    if settings.kv_bytes is not None or weights is None:
        return ""
    if len(budgets) < 2:
        return f"; none beside weights of {gib_text(weights)}"
    standard, paged = (users.of(system).users[budgets[-1].name] for system in (STANDARD, PAGED))
    return f"; after the weights {_one(standard)} and {_one(paged)}"


def _with(table: Table, formulas: Iterable[str], others: Iterable[str]) -> str:
    return "\n".join([table.as_text(), *(f"  {line}" for line in formulas), *others])


def _one(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return MISSING if share is None else percent(share)
