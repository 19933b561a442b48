"""The implementations of paged attention, by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from pagedattn.attention.call import AttentionCall
    from pagedattn.kv_cache import LayerCache


class Implementation(Protocol):
    """What a kernel must offer to be tested, timed and used here.

    A call arrives validated (see `pagedattn.attention.api`): shapes agree, tensors are on one
    device, `out` is allocated. A method `prepare(call) -> Launch` may be added, see
    `pagedattn.attention.launch.Launch`, and a method `rotary_write_kv(query, key, value, cache,
    slots, positions, rotary, out)` that does what `pagedattn.attention.rotary_write_kv` says;
    without it Q and K are turned by PyTorch and `write_kv` is called.
    """

    name: str

    def unsupported(self, call: AttentionCall) -> str | None:
        """Say in a phrase why this call cannot be taken, or None if it can."""

    def attention(self, call: AttentionCall) -> None:
        """Write every row of `call.out`, and of `call.lse` if it is not None."""

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Write K and V of tokens into their slots; slots outside the cache are skipped.

        Into an fp8 cache go `key / cache.key_scale` and `value / cache.value_scale`, limited to
        +-448 and rounded to nearest, ties to even.
        """


_BUILT_IN = {
    "cuda": "pagedattn.attention.cuda:CudaImplementation",
    "triton": "pagedattn.attention.triton:TritonImplementation",
    "torch": "pagedattn.attention.torch_impl:TorchImplementation",
    "reference": "pagedattn.attention.reference:ReferenceImplementation",
}
_made: dict[str, Implementation] = {}


def register(implementation: Implementation) -> None:
    """Make an implementation known under its `name`.

    Raises:
        ValueError: the name is taken.

    """
    if implementation.name in _BUILT_IN or implementation.name in _made:
        raise ValueError(f"an implementation named {implementation.name!r} exists already")
    _made[implementation.name] = implementation


def implementation_names() -> list[str]:
    """Names that `get_implementation` takes, the built-in ones first."""
    return [*_BUILT_IN, *(name for name in _made if name not in _BUILT_IN)]


def get_implementation(name: str) -> Implementation:
    """Return the implementation of that name, importing it on first use.

    Raises:
        ValueError: there is none; the sentence lists those there are.
        ImportError: a package that it needs is missing.

    """
    if name not in _made:
        if name not in _BUILT_IN:
            known = ", ".join(implementation_names())
            raise ValueError(f"there is no implementation {name!r}; known are {known}")
        module, _, attribute = _BUILT_IN[name].partition(":")
        _made[name] = getattr(importlib.import_module(module), attribute)()
    return _made[name]
