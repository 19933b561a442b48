"""Attention over a paged KV cache: one function, several implementations."""

from pagedattn.attention.api import attention, write_kv
from pagedattn.attention.batch import AttentionBatch
from pagedattn.attention.call import AttentionCall
from pagedattn.attention.launch import Launch
from pagedattn.attention.registry import (
    Implementation,
    get_implementation,
    implementation_names,
    register,
)

__all__ = [
    "AttentionBatch",
    "AttentionCall",
    "Implementation",
    "Launch",
    "attention",
    "get_implementation",
    "implementation_names",
    "register",
    "write_kv",
]
