"""The implementations of paged attention, by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from pagedattn.attention.plugins import plugins

if TYPE_CHECKING:
    import torch

    from pagedattn.attention.call import AttentionCall
    from pagedattn.kv_cache import LayerCache


class Implementation(Protocol):
    """What a kernel must offer to be tested, timed and used here.

    A call arrives validated (see `pagedattn.attention.api`): shapes agree, tensors are on one
    device, `out` is allocated.

    These may be added:

    - `prepare(call) -> Launch`: see `pagedattn.attention.launch.Launch`;
    - `rotary_write_kv(query, key, value, cache, slots, positions, rotary, out)`: does what
      `pagedattn.attention.rotary_write_kv` says; without it Q and K are turned by PyTorch and
      `write_kv` is called;
    - `rounds_to(call) -> torch.dtype | None`: a lower type than the query's that queries and
      softmax weights are rounded to; the error that is allowed is that of such a computation;
    - `rounds_parts = True`: partial results are rounded to the query's type before they are merged;
    - `lse_error(call) -> float`: absolute error that its log-sum-exp may have on top of that of a
      computation in float32, where its way of computing it is known to be coarser;
    - `gather_rows` and `merge_parts`: see `pagedattn.attention.cascade.run.PartsImplementation`;
      without them blocks that sequences share are read for each sequence;
    - `reads_unused_slots = True`: slots that no query sees, behind a sequence's last token, before
      every query's window or of other sequences, are multiplied by 0. Tests then fill them with
      zeros and not with NaN, of which 0 times is NaN;
    - `checks_slots = False`: slots outside the cache must not be given to `write_kv`.

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
    "cuda_fp8": "pagedattn.attention.cuda:CudaFp8Implementation",
}
_made: dict[str, Implementation] = {}


class UnsupportedError(ValueError):
    """An implementation cannot take a call, and finds out only when it runs.

    The message is a phrase like those of `Implementation.unsupported`, which is the better place
    where it can be known before.
    """


def register(implementation: Implementation) -> None:
    """Make an implementation known under its `name`, in this process.

    An installed package makes its own known to every process by an entry point, see
    `pagedattn.attention.plugins`.

    Raises:
        ValueError: the name is taken.

    """
    name = implementation.name
    if name in _BUILT_IN or name in _made:
        raise ValueError(f"an implementation named {name!r} exists already")
    if name in plugins():
        packages = plugins()[name].packages
        offering = (
            f"the package {packages[0]} offers it"
            if len(packages) == 1
            else f"the packages {' and '.join(packages)} offer it"
        )
        raise ValueError(f"an implementation named {name!r} exists already: {offering}")
    _made[name] = implementation


def implementation_names() -> list[str]:
    """Names that `get_implementation` takes: the built-in ones, then others.

    Those of installed packages are among them even if a package turns out to be broken.
    """
    offered = (name for name, plugin in plugins().items() if plugin.clash is None)
    return list(dict.fromkeys([*_BUILT_IN, *_made, *offered]))


def clashes() -> list[str]:
    """One sentence for each name that installed packages offer in vain, being taken already."""
    taken = [
        f"the package {package} offers an implementation {name!r}, which is built in; "
        "the built-in one is used"
        for name, plugin in plugins().items()
        if name in _BUILT_IN
        for package in plugin.packages
    ]
    return taken + [
        plugin.clash
        for name, plugin in plugins().items()
        if plugin.clash is not None and name not in _BUILT_IN
    ]


def get_implementation(name: str) -> Implementation:
    """Return the implementation of that name, importing it on first use.

    Raises:
        ValueError: there is none; the sentence lists those there are.
        ImportError: a package that it needs is missing, or the package that offers it is broken.

    """
    if name not in _made:
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            _made[name] = getattr(importlib.import_module(module), attribute)()
        elif name in plugins():
            _made[name] = plugins()[name].load()
        else:
            known = ", ".join(implementation_names())
            raise ValueError(f"there is no implementation {name!r}; known are {known}")
    return _made[name]
