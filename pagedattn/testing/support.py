"""What an implementation supports, found by running it: a probe for each feature."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pagedattn.attention import UnsupportedError, get_implementation
from pagedattn.attention.reference import reference_attention
from pagedattn.kv_cache import FP8, LayerCache, quantised
from pagedattn.testing.finite import finite
from pagedattn.testing.inputs import AttentionInputs, make_inputs
from pagedattn.testing.tolerance import (
    error_budget,
    error_of,
    known_roundings,
    lse_budget,
    lse_error,
)
from pagedattn.workloads import AttentionShape

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall, Implementation

HEAD_SIZES = (64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
KINDS = ("decode", "prefill", "mixed")
SHARED = "shared prefix"
FP8_OPTION = "fp8, a scale a tensor"
OPTIONS = (FP8_OPTION, "fp8, a scale a head", "window", "soft cap", "ALiBi", "sinks")
LSE, GRAPH, DETERMINISM = "log-sum-exp", "CUDA graph", "same bits again"

_BATCHES = {
    "decode": ((1,) * 5, (1, 15, 16, 17, 333)),
    "prefill": ((1, 15, 16, 17, 70), (1, 15, 16, 17, 70)),
    "mixed": ((1, 5, 16, 1, 40), (1, 15, 16, 17, 133)),
    "uniform decode": ((1,) * 3, (133,) * 3),
    "uniform prefill": ((70,) * 3, (70,) * 3),
    SHARED: ((1, 1, 7), (290, 275, 300)),  # 256 tokens of which are the same
}
_TRIED = {
    "decode": ("decode", "uniform decode"),
    "prefill": ("prefill", "uniform prefill"),
    "mixed": ("mixed",),
    SHARED: (SHARED,),
}
_ELSE = ("decode", "mixed", "uniform decode", "uniform prefill", SHARED)


@dataclass(frozen=True)
class Finding:
    """What became of one feature.

    Attributes:
        implementation: its name.
        feature: one of `features()`.
        status: `passed`, `wrong` (an error above the budget), `unsupported` (it said so),
            `raised`, or `untried` (the machine cannot).
        detail: the phrase, the error or the exception; of what passed, what it is limited to.

    """

    implementation: str
    feature: str
    status: str
    detail: str = ""


def features() -> list[str]:
    """All that is probed, in order."""
    return [
        *KINDS,
        SHARED,
        *OPTIONS,
        LSE,
        *(f"head size {size}" for size in HEAD_SIZES),
        *(f"block size {size}" for size in BLOCK_SIZES),
        GRAPH,
        DETERMINISM,
    ]


def probe(implementation: str, feature: str, device: str = "cuda") -> Finding:
    """Run an implementation on small random batches that need one feature; see `Finding`.

    A kind is tried with ragged lengths, then with equal ones. Other features are tried on a decode
    and on a mixed batch; where neither is taken, on equal lengths and on a shared prefix. One that
    is right makes it pass, one that is wrong makes it wrong. Who takes no 16-bit cache is tried
    over fp8.

    Args:
        implementation: a name from `pagedattn.attention.implementation_names()`.
        feature: one of `features()`.
        device: where to run; bfloat16 on a GPU, and float16 on a CPU.

    """
    made = get_implementation(implementation)
    if feature == GRAPH and device == "cpu":
        return Finding(implementation, feature, "untried", "there is no CUDA GPU")
    found = _tried(made, feature, device)
    needs_fp8 = _all_refused(found) and _takes_fp8_only(made, device)
    if needs_fp8:
        found = _tried(made, feature, device, in_fp8=True)
    status, detail = _together(found)
    if needs_fp8 and status != "unsupported":
        detail = "; ".join(filter(None, ("over fp8", detail)))
    return Finding(implementation, feature, status, detail)


def _tried(
    made: Implementation, feature: str, device: str, *, in_fp8: bool = False
) -> dict[str, tuple[str, str]]:
    """Return the status and detail of each batch that is tried for a feature."""
    found: dict[str, tuple[str, str]] = {}
    for place, batch in enumerate(_TRIED.get(feature, _ELSE)):
        is_resort = place >= (1 if feature in KINDS else 2)
        if is_resort and not _all_refused(found):
            break
        found[batch] = _run(made, batch, feature, device, in_fp8)
    return found


def _all_refused(found: dict[str, tuple[str, str]]) -> bool:
    return all(status == "unsupported" for status, _ in found.values())


def _takes_fp8_only(made: Implementation, device: str) -> bool:
    """Whether an implementation refuses all plain batches over a 16-bit cache, and not over fp8."""

    def refuses_all(feature: str) -> bool:
        calls = (_inputs(batch, feature, device)[0].call() for batch in _ELSE)
        return all(made.unsupported(call) is not None for call in calls)

    try:
        return refuses_all("") and not refuses_all(FP8_OPTION)
    except Exception:  # noqa: BLE001 - one that raises when asked is told of where it is tried
        return False


def _together(found: dict[str, tuple[str, str]]) -> tuple[str, str]:
    for status in ("wrong", "raised"):
        for batch, (each, detail) in found.items():
            if each == status:
                return status, f"{batch}: {detail}"
    passed = [batch for batch, (status, _) in found.items() if status == "passed"]
    if not passed:
        return next(iter(found.values()))
    refused = [status for status, _ in found.values() if status == "unsupported"]
    notes = [f"{passed[0]} only"] if refused and len(passed) == 1 else []
    notes += dict.fromkeys(found[batch][1] for batch in passed if found[batch][1])
    return "passed", "; ".join(notes)


def _run(
    made: Implementation, batch: str, feature: str, device: str, in_fp8: bool
) -> tuple[str, str]:
    inputs, lse = _inputs(batch, feature, device, in_fp8)
    call = inputs.call(out=torch.full_like(inputs.query, torch.nan), lse=lse)
    try:
        if (reason := made.unsupported(call)) is not None:
            return "unsupported", reason
        return _checked(made, inputs, call, feature)
    except UnsupportedError as refusal:
        phrase = str(refusal)
        return ("raised" if phrase.startswith("it raised") else "unsupported"), phrase
    except Exception as error:  # noqa: BLE001 - a finding, whatever it is
        first = (str(error).splitlines() or [""])[0]
        return "raised", f"{type(error).__name__}: {first}"[:160]


def _checked(
    made: Implementation, inputs: AttentionInputs, call: AttentionCall, feature: str
) -> tuple[str, str]:
    lower, rounds_parts = known_roundings(made, call)
    exact, exact_lse = reference_attention(inputs.call(), torch.float64)
    budget = error_budget(inputs, exact, lower, rounds_parts)
    notes = [] if lower is None else [f"rounds to {str(lower).removeprefix('torch.')}"]
    _attend(made, call, feature)
    if not call.out.isfinite().all():
        with finite(inputs.cache):
            _attend(made, call, feature)
        notes.append("multiplies unused slots by 0")
    error = error_of(call.out, exact)
    if not budget.covers(error):
        return "wrong", f"an error of {error.relative:.2g}, where {budget.relative:.2g} may be"
    if call.lse is not None:
        off, allowed = lse_error(call.lse, exact_lse), lse_budget(inputs, exact_lse, made.name)
        if off > allowed:
            return "wrong", f"a log-sum-exp off by {off:.2g}, where {allowed:.2g} may be"
        if hasattr(made, "lse_error") and (coarser := made.lse_error(call)):
            notes.append(f"off by up to {coarser:.1g}")
    if feature == DETERMINISM:
        first = call.out.clone()
        with finite(inputs.cache):
            made.attention(call)
        if not torch.equal(call.out, first):
            return "wrong", "other bits in a second run"
    return "passed", "; ".join(notes)


def _attend(made: Implementation, call: AttentionCall, feature: str) -> None:
    if feature != GRAPH:
        made.attention(call)
        return
    prepare = getattr(made, "prepare", None)
    run = (lambda: made.attention(call)) if prepare is None else prepare(call)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    call.out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()


def _inputs(
    batch: str, feature: str, device: str, in_fp8: bool = False
) -> tuple[AttentionInputs, torch.Tensor | None]:
    what, _, number = feature.rpartition(" ")
    shape = AttentionShape(
        feature,
        *_BATCHES[batch],
        num_query_heads=8,
        num_kv_heads=2,
        head_size=int(number) if what == "head size" else 64,
        block_size=int(number) if what == "block size" else 16,
        dtype="bfloat16" if device == "cuda" else "float16",
        shared_prefix=256 if batch == SHARED else 0,
    )
    inputs = make_inputs(
        shape,
        device=device,
        seed=1,
        window=20 if feature == "window" else None,
        soft_cap=3.0 if feature == "soft cap" else None,
        alibi=feature == "ALiBi",
    )
    if in_fp8 or feature.startswith("fp8"):
        inputs = dataclasses.replace(
            inputs, cache=over_fp8(inputs.cache, per_head=feature.endswith("head"))
        )
    if feature == "sinks":
        # a few bits each, for kernels whose sinks are bfloat16
        sinks = torch.tensor(
            [math.floor(4 * math.sin(head)) / 2 for head in range(shape.num_query_heads)]
        )
        inputs = dataclasses.replace(inputs, sinks=sinks.to(device))
    lse = None
    if feature == LSE:
        lse = torch.full(inputs.query.shape[:2], torch.nan, device=device)
    return inputs, lse


def over_fp8(cache: LayerCache, *, per_head: bool) -> LayerCache:
    """Quantise a cache to fp8, NaN and all.

    Args:
        cache: one layer, of another dtype; read only.
        per_head: another scale for each head, and for K and V; else one for all.

    """
    ramp = torch.arange(cache.num_kv_heads, device=cache.key.device)
    key_scale = 0.05 * (1 + ramp * per_head).float()
    value_scale = key_scale * (0.5 if per_head else 1.0)
    key, value = (
        quantised(part.transpose(1, 2), scale, FP8).transpose(1, 2)
        for part, scale in ((cache.key, key_scale), (cache.value, value_scale))
    )
    return LayerCache(key, value, key_scale, value_scale)
