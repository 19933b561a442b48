"""What all adapters to other kernels have in common: they bind first, and say what they refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pagedattn.attention import Launch, UnsupportedError

if TYPE_CHECKING:
    from pagedattn.attention import AttentionCall

HALVES = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
TANH_ERROR = 2.0**-11
"""Of `tanh.approx.f32`, relative (PTX ISA)."""
_REFUSALS = (AssertionError, NotImplementedError, RuntimeError, ValueError)
_LONGEST = 160  # letters of a peer's own words
_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")


class Adapter:
    """A peer's kernel as an implementation of attention.

    A subclass says what the kernel takes, and binds a call to it in `bind`.

    Attributes:
        name: of the implementation.
        features: those of `pagedattn.attention.call.FEATURES` that the kernel has.
        dtypes: of queries.
        takes_strides: whether query and out may have gaps between tokens and heads; else they are
            copied as a part of the launch.
        scales_per_head: whether an fp8 cache may have another scale for each head.
        reads_unused_slots: see `pagedattn.attention.Implementation`.
        checks_slots: the same.

    """

    name: str
    features: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = HALVES
    takes_strides = False
    scales_per_head = False
    reads_unused_slots = False
    checks_slots = False

    def missing(self, device: torch.device) -> str | None:
        """Say what the machine lacks for this kernel on a device, or None."""
        raise NotImplementedError

    def refuse(self, call: AttentionCall) -> str | None:
        """Say what else the kernel does not take, or None."""
        return None

    def bind(self, call: AttentionCall) -> Launch:
        """Make everything ready for a call that `unsupported` has nothing against."""
        raise NotImplementedError

    def rounds_to(self, call: AttentionCall) -> torch.dtype | None:
        """Type that queries and weights are rounded to, if a lower one than the query's."""
        return None

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say what it cannot take, or None."""
        if missing := self.missing(call.query.device):
            return missing
        if call.query.dtype not in self.dtypes:
            return f"it takes {_names(self.dtypes)}, not {_names((call.query.dtype,))}"
        if lacking := call.beyond(self.features):
            return lacking
        if "fp8" in call.features and not self.scales_per_head:
            scales = (call.cache.key_scale, call.cache.value_scale)
            if any(scale is not None and (scale != scale[0]).any() for scale in scales):
                return "its scales of an fp8 cache are one number for all heads"
        return self.refuse(call)

    def attention(self, call: AttentionCall) -> None:
        """Plan, then write every row of `call.out`, and of `call.lse` if it is given."""
        self.prepare(call)()

    def prepare(self, call: AttentionCall) -> Launch:
        """Bind a call, and run it once: some kernels refuse only then.

        Raises:
            UnsupportedError: the peer raised; its own first line is in the message.

        """
        try:
            launch = self._bind(call)
            launch()
        except UnsupportedError:
            raise
        except Exception as error:
            if not is_refusal(error):
                raise
            raise UnsupportedError(f"it raised {_in_short(error)}") from error
        return launch

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: object, slots: torch.Tensor
    ) -> None:
        """Refuse: not every peer has a kernel for it."""
        raise UnsupportedError("it has no KV write of its own by slots")

    def _bind(self, call: AttentionCall) -> Launch:
        if self.takes_strides or (call.query.is_contiguous() and call.out.is_contiguous()):
            return self.bind(call)
        query = call.query.contiguous()
        out = torch.empty_like(query)
        inner = self.bind(replace(call, query=query, out=out))

        def run() -> None:
            query.copy_(call.query)
            inner()
            call.out.copy_(out)

        return Launch(run, call.out, inner.plan)


def is_refusal(error: Exception) -> bool:
    """Whether an error means that a kernel does not take these inputs, not that it is broken."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return False
    return isinstance(error, _REFUSALS) or type(error).__module__.startswith("triton.")


def one_scale(scale: torch.Tensor | None) -> float:
    """Scale of a whole tensor: the first head's; waits for the GPU."""
    return 1.0 if scale is None else float(scale[0])


def is_decode(call: AttentionCall) -> bool:
    """Whether each sequence has exactly one query token."""
    batch = call.batch
    return batch.max_query_length == 1 and batch.num_query_tokens == batch.num_sequences


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _in_short(error: Exception) -> str:
    """Its kind and its most telling line, with files' names but not where they lie."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    line = _FOLDERS.sub("", line)
    return f"{type(error).__name__}: {line}"[:_LONGEST].rstrip(": ")
