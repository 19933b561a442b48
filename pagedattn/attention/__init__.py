"""Attention over a paged KV cache: one function, several implementations."""

from pagedattn.attention.api import attention, write_kv
from pagedattn.attention.batch import AttentionBatch
from pagedattn.attention.call import AttentionCall
from pagedattn.attention.launch import Launch
from pagedattn.attention.registry import (
    Implementation,
    UnsupportedError,
    clashes,
    get_implementation,
    implementation_names,
    register,
)
from pagedattn.attention.rotary import Rotary, rotary_write_kv, rotate

__all__ = [
    "AttentionBatch",
    "AttentionCall",
    "Implementation",
    "Launch",
    "Rotary",
    "UnsupportedError",
    "attention",
    "clashes",
    "get_implementation",
    "implementation_names",
    "register",
    "rotary_write_kv",
    "rotate",
    "write_kv",
]
