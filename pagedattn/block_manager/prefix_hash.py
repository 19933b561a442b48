"""What a block is found by: a hash chained over its prefix.

The digest of a full block is SHA-256 over its parent's digest, its tokens and what else its K and
V depend on, so equal digests mean equal prefixes, up to a collision of SHA-256. The first parent
is a root that is random for each manager unless a seed is given: whoever can choose prompts
cannot know which digests they make (CVE-2025-25183 was vLLM 0.7's predictable hash). A salt parts
tenants: without the same salt no block is shared, and whether a prompt was quick says nothing of
the prompts of others (CVE-2025-46570, a timing side channel).
"""

from __future__ import annotations

import hashlib
import os
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedattn.block_manager.ragged import whole_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

DIGEST_BYTES = 32
MAX_TOKEN_ID = 2**31 - 1
_ROOT_TAG = b"pagedattn prefix root 1"
_NEXT_TAG = b"pagedattn next seed 1"


@dataclass(frozen=True)
class CacheKeys:
    """What else, beside its tokens, a prompt's K and V depend on, or who may share them.

    Attributes:
        adapter: name of the adapter (LoRA) that runs, or None.
        salt: sequences share blocks only with those of the same salt; or None.
        media: images and the like whose placeholder tokens look alike: pairs of the position of
            the first placeholder in the prompt, in tokens, and a digest of the content.

    """

    adapter: str | None = None
    salt: str | None = None
    media: tuple[tuple[int, bytes], ...] = ()

    def __post_init__(self) -> None:
        for what, name in (("adapter", self.adapter), ("salt", self.salt)):
            if not (name is None or isinstance(name, str)):
                raise ValueError(f"{what} must be a string or None; given {name!r}")
        if not isinstance(self.media, (tuple, list)):
            raise ValueError(
                f"media must be a tuple of pairs of a position and bytes; given {self.media!r}"
            )
        for pair in self.media:
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise ValueError(f"media must be pairs of a position and bytes; given {pair!r}")
            position, content = pair
            if not isinstance(position, int) or position < 0 or not isinstance(content, bytes):
                raise ValueError(
                    "media must be pairs of a position in tokens, 0 or more, and bytes; "
                    f"given {position!r} and {content!r}"
                )


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part


@dataclass(frozen=True)
class Prompts:
    """Prompts as one flat array.

    Attributes:
        tokens: int32 [num_tokens], all prompts one after the other.
        lengths: int64 [num_prompts].
        keys: a prompt's keys, or None, for each.

    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    keys: Sequence[CacheKeys | None]

    @classmethod
    def of(
        cls,
        prompts: Sequence[ArrayLike],
        keys: CacheKeys | Sequence[CacheKeys | None] | None,
    ) -> Prompts:
        """Check and join prompts.

        Raises:
            ValueError: a prompt is empty or has something else than token ids from 0 to
                2**31 - 1, or there is not one key a prompt, or media lies outside its prompt.

        """
        is_array = isinstance(prompts, np.ndarray) and prompts.ndim > 0
        if not (is_array or isinstance(prompts, (list, tuple))):
            raise ValueError(f"prompts must be a list of prompts; given {prompts!r}")
        for prompt in prompts[:1]:
            if np.isscalar(prompt) or (isinstance(prompt, np.ndarray) and prompt.ndim == 0):
                raise ValueError(
                    f"prompts must be a list of prompts; the first of it is {prompt!r}"
                )
        parts = [_as_integers(prompt) for prompt in prompts]
        lengths = np.array([part.size for part in parts], dtype=np.int64)
        if (lengths == 0).any():
            raise ValueError(f"prompt {int(np.argmin(lengths))} is empty; it needs 1 token")
        if not (keys is None or isinstance(keys, (CacheKeys, list, tuple))):
            raise ValueError(f"keys must be CacheKeys, or a list of them; given {keys!r}")
        each = [keys] * len(parts) if keys is None or isinstance(keys, CacheKeys) else [*keys]
        for key in each:
            if key is not None and not isinstance(key, CacheKeys):
                raise ValueError(f"keys must be CacheKeys or None; given {key!r}")
        if len(each) != len(parts):
            raise ValueError(f"{len(each)} keys were given for {len(parts)} prompts")
        for number, (key, length) in enumerate(zip(each, lengths.tolist(), strict=True)):
            if key is not None and any(position >= length for position, _ in key.media):
                raise ValueError(f"prompt {number} has {length} tokens, and media behind its end")
        if len(parts) == 1:
            return cls(token_ids_of(parts[0]), lengths, each)
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return cls(token_ids_of(tokens), lengths, each)


def _as_integers(prompt: ArrayLike) -> NDArray[Any]:
    """Return a prompt as a one-dimensional array of integers."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind == "i":
        return prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], bool):
        try:
            return np.frombuffer(array("q", prompt), np.int64)  # faster than numpy's own way
        except (TypeError, OverflowError):
            pass  # whole_numbers says what is wrong
    return whole_numbers(prompt, "a prompt's token ids")


def token_ids_of(values: ArrayLike) -> NDArray[np.int32]:
    """Return token ids as int32 [num_tokens]; refuse what is none."""
    if isinstance(values, np.ndarray) and values.dtype == np.int32:
        if values.size and values.min() < 0:
            raise ValueError(f"a token id is {values.min()}; it must be from 0 to {MAX_TOKEN_ID}")
        return values.reshape(-1).astype("<i4", copy=False)
    tokens = whole_numbers(values, "token ids")
    # as an unsigned number, a negative one is above the limit too
    if tokens.size and tokens.view(np.uint64).max() > MAX_TOKEN_ID:
        bad = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"a token id is {bad}; it must be from 0 to {MAX_TOKEN_ID}")
    return tokens.astype("<i4")


def digest_bytes(digests: NDArray[np.uint64]) -> list[bytes]:
    """Return digests, uint64 [num_digests, 4] and contiguous, as bytes."""
    made: list[bytes] = digests.reshape(-1).view(f"V{DIGEST_BYTES}").tolist()
    return made


class PrefixHasher:
    """Chains digests over blocks of tokens.

    Args:
        block_size: tokens a block.
        seed: equal seeds give equal digests in every process; None takes 32 random bytes.

    """

    def __init__(self, block_size: int, seed: bytes | None = None) -> None:
        if seed is not None and not isinstance(seed, bytes):
            raise ValueError(f"seed must be bytes, or None for a random one; given {seed!r}")
        self.block_size = block_size
        self.seed = os.urandom(DIGEST_BYTES) if seed is None else seed
        self.root = self.root_of(None)

    def move_on(self) -> None:
        """Take the next seed: nothing hashed before equals what is hashed from now on."""
        self.seed = hashlib.sha256(_framed(_NEXT_TAG) + self.seed).digest()
        self.root = self.root_of(None)

    def root_of(self, keys: CacheKeys | None) -> bytes:
        """Parent of a prompt's first block: the seed, the adapter and the salt."""
        named = (None, None) if keys is None else (keys.adapter, keys.salt)
        parts = [b"\0" if key is None else b"\1" + _framed(key.encode()) for key in named]
        return hashlib.sha256(_framed(_ROOT_TAG) + _framed(self.seed) + b"".join(parts)).digest()

    def media_of(self, keys: CacheKeys | None) -> dict[int, bytes]:
        """What media adds to the blocks it begins in: logical block to bytes."""
        added: dict[int, bytes] = {}
        for position, content in sorted(keys.media) if keys else ():
            block, offset = divmod(position, self.block_size)
            added[block] = added.get(block, b"") + offset.to_bytes(8, "little") + _framed(content)
        return added

    def chain(
        self,
        tokens: NDArray[np.int32],
        starts: NDArray[np.int64],
        num_blocks: NDArray[np.int64],
        parents: Sequence[bytes],
        media: Mapping[int, Mapping[int, bytes]] | None = None,
    ) -> NDArray[np.uint64]:
        """Digests of full blocks of several sequences.

        Args:
            tokens: int32 [num_tokens].
            starts: int64 [num_sequences], where in `tokens` each sequence's blocks begin.
            num_blocks: int64 [num_sequences], full blocks of each.
            parents: the digest before each sequence's first block here.
            media: `media_of` for the numbers of those sequences that have any.

        Returns:
            uint64 [sum of num_blocks, 4], sequence after sequence.

        """
        digests: list[bytes] = []
        sha256, width = hashlib.sha256, f"V{4 * self.block_size}"
        for number, (start, count) in enumerate(
            zip(starts.tolist(), num_blocks.tolist(), strict=True)
        ):
            digest = parents[number]
            stop = start + count * self.block_size
            blocks: list[bytes] = tokens[start:stop].view(width).tolist()
            for column, added in media.get(number, {}).items() if media else ():
                if column < count:
                    blocks[column] += added
            digests += [digest := sha256(digest + block).digest() for block in blocks]
        return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 4)

    def extend(self, blocks: NDArray[np.int32], parents: Sequence[bytes]) -> NDArray[np.uint64]:
        """Digests of one more full block of each sequence, without media.

        Args:
            blocks: int32 [num_sequences, block_size], the blocks' tokens.
            parents: the digest before each.

        Returns:
            uint64 [num_sequences, 4].

        """
        contents: list[bytes] = blocks.reshape(-1).view(f"V{4 * self.block_size}").tolist()
        digests = [
            hashlib.sha256(parent + content).digest()
            for parent, content in zip(parents, contents, strict=True)
        ]
        return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 4)
