"""Digests of prefixes: what changes them, what does not, and who can foresee them."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedattn.block_manager.prefix_hash import (
    MAX_TOKEN_ID,
    CacheKeys,
    PrefixHasher,
    Prompts,
    token_ids_of,
)

SEED = b"seed"


def digests_of(tokens, keys=None, block_size=4, seed=SEED):
    """Digests of one prompt's full blocks, as bytes."""
    hasher = PrefixHasher(block_size, seed)
    media = {0: hasher.media_of(keys)}
    found = hasher.chain(
        np.array(tokens, np.int32),
        np.array([0]),
        np.array([len(tokens) // block_size]),
        [hasher.root_of(keys)],
        media,
    )
    assert found.dtype == np.uint64
    assert found.shape == (len(tokens) // block_size, 4)
    return [digest.tobytes() for digest in found]


def length(number):
    return number.to_bytes(8, "little")


def golden(tokens, block_size, seed, adapter=None, salt=None, media=()):
    """The construction, written a second time from its description."""
    tag = b"pagedattn prefix root 1"
    root = hashlib.sha256(length(len(tag)) + tag + length(len(seed)) + seed)
    for name in (adapter, salt):
        if name is None:
            root.update(b"\0")
        else:
            root.update(b"\1" + length(len(name.encode())) + name.encode())
    parent, digests = root.digest(), []
    for start in range(0, len(tokens) // block_size * block_size, block_size):
        block = hashlib.sha256(parent)
        for token in tokens[start : start + block_size]:
            block.update(token.to_bytes(4, "little"))
        for position, content in sorted(media):
            if start <= position < start + block_size:
                block.update(length(position - start) + length(len(content)) + content)
        parent = block.digest()
        digests.append(parent)
    return digests


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("adapter", [None, "", "lora-7"], ids=repr)
@pytest.mark.parametrize("salt", [None, "", "tenant é"], ids=repr)
def test_digests_are_those_of_hashlib(block_size, adapter, salt):
    tokens = [0, 1, 258, MAX_TOKEN_ID, 5, 6, 7, 8, 9, 10, 11]
    media = ((9, b"later"), (1, b""), (1, b"one"), (2, b"x" * 100))
    keys = CacheKeys(adapter, salt, media)
    expected = golden(tokens, block_size, SEED, adapter, salt, media)
    assert digests_of(tokens, keys, block_size) == expected


@pytest.mark.parametrize("tokens", [[0] * 8, [5, 0, 0, 0, 0, 0, 0, 7]], ids=str)
def test_tokens_of_zero_are_hashed_like_others(tokens):
    assert digests_of(tokens) == golden(tokens, 4, SEED)
    assert digests_of(tokens, block_size=1) == golden(tokens, 1, SEED)


def test_a_digest_stays_what_it_was_in_the_first_version():
    (digest,) = digests_of([1, 2, 3, 4])
    tag = b"\x17\0\0\0\0\0\0\0pagedattn prefix root 1"
    root = hashlib.sha256(tag + b"\4\0\0\0\0\0\0\0seed" + b"\0\0").digest()
    tokens = b"\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0"
    assert digest == hashlib.sha256(root + tokens).digest()


# -- what changes a digest -----------------------------------------------------------------

TOKENS = st.lists(st.integers(0, MAX_TOKEN_ID), min_size=4, max_size=12)


@given(TOKENS, st.data())
def test_one_other_token_changes_its_block_and_all_after_it_and_none_before(tokens, data):
    place = data.draw(st.integers(0, len(tokens) // 4 * 4 - 1))
    other = list(tokens)
    other[place] = data.draw(st.integers(0, MAX_TOKEN_ID).filter(lambda t: t != tokens[place]))
    before, after = digests_of(tokens), digests_of(other)
    same = [one == two for one, two in zip(before, after, strict=True)]
    assert same == [column < place // 4 for column in range(len(before))]


@given(TOKENS)
def test_tokens_after_the_last_full_block_change_nothing(tokens):
    full = tokens[: len(tokens) // 4 * 4]
    assert digests_of([*full, 1, 2, 3]) == digests_of(full)


def test_equal_blocks_with_other_parents_differ():
    digests = digests_of([1, 2, 3, 4] * 5)
    assert len(set(digests)) == 5


def test_tokens_of_other_orders_differ():
    assert digests_of([1, 2, 3, 4]) != digests_of([2, 1, 3, 4])


NAMES = st.one_of(st.none(), st.text("ab\0é", max_size=3))


@given(NAMES, NAMES, NAMES, NAMES)
def test_adapters_and_salts_are_told_apart(adapter, salt, other_adapter, other_salt):
    hasher = PrefixHasher(4, SEED)
    one = hasher.root_of(CacheKeys(adapter, salt))
    two = hasher.root_of(CacheKeys(other_adapter, other_salt))
    assert (one == two) == ((adapter, salt) == (other_adapter, other_salt))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param(("a", None), (None, "a"), id="adapter-or-salt"),
        pytest.param((None, None), ("", None), id="no-adapter-or-an-empty-one"),
        pytest.param((None, None), (None, ""), id="no-salt-or-an-empty-one"),
        pytest.param(("", None), (None, ""), id="empty-adapter-or-empty-salt"),
        pytest.param(("ab", "c"), ("a", "bc"), id="cut-elsewhere"),
        pytest.param(("a\0", "b"), ("a", "\0b"), id="cut-at-a-zero-byte"),
    ],
)
def test_names_that_could_be_mistaken_give_other_roots(one, two):
    hasher = PrefixHasher(4, SEED)
    assert hasher.root_of(CacheKeys(*one)) != hasher.root_of(CacheKeys(*two))


def test_no_keys_and_empty_keys_are_the_same():
    hasher = PrefixHasher(4, SEED)
    assert hasher.root_of(None) == hasher.root_of(CacheKeys()) == hasher.root
    assert hasher.media_of(None) == hasher.media_of(CacheKeys()) == {}


MEDIA = st.lists(st.tuples(st.integers(0, 7), st.binary(max_size=2)), max_size=3)


@given(MEDIA, MEDIA)
def test_media_of_other_places_or_contents_differ(one, two):
    tokens = range(8)
    first = digests_of(tokens, CacheKeys(media=tuple(one)))
    second = digests_of(tokens, CacheKeys(media=tuple(two)))
    for column, (left, right) in enumerate(zip(first, second, strict=True)):
        # the chain: a block stands for all that came before
        upto = [sorted(m for m in media if m[0] < 4 * (column + 1)) for media in (one, two)]
        assert (left == right) == (upto[0] == upto[1])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((), id="none"),
        pytest.param(((4, b"a"), (6, b"b")), id="another-place-in-the-block"),
        pytest.param(((5, b"b"), (6, b"a")), id="contents-exchanged"),
        pytest.param(((5, b"a"),), id="one-less"),
        pytest.param(((5, b"a"), (6, b"b"), (6, b"")), id="one-more-without-content"),
        pytest.param(((5, b"ab"), (6, b"")), id="cut-elsewhere"),
        pytest.param(((1, b"a"), (6, b"b")), id="another-block"),
    ],
)
def test_other_media_change_the_block_that_they_begin_in(other):
    media = ((5, b"a"), (6, b"b"))
    one = digests_of(range(8), CacheKeys(media=media))
    two = digests_of(range(8), CacheKeys(media=other))
    assert one[1] != two[1]


def test_the_order_in_which_media_are_named_does_not_matter():
    media = ((5, b"a"), (6, b"b"), (5, b"c"))
    one = digests_of(range(8), CacheKeys(media=media))
    assert one == digests_of(range(8), CacheKeys(media=media[::-1]))


def test_media_leave_the_blocks_before_them_as_they_are():
    one, two = digests_of(range(8)), digests_of(range(8), CacheKeys(media=((4, b"a"),)))
    assert one[0] == two[0]
    assert one[1] != two[1]


def test_another_block_size_gives_other_digests():
    tokens = range(24)
    sets = [set(digests_of(tokens, block_size=size)) for size in (1, 2, 3, 4, 6, 8)]
    assert len(set().union(*sets)) == sum(map(len, sets))


# -- batches -------------------------------------------------------------------------------


def test_a_batch_has_the_digests_of_each_prompt_alone():
    hasher = PrefixHasher(4, SEED)
    prompts = [range(9), range(3), [1] * 12, range(8)]
    keys = [None, None, CacheKeys("a", "b", ((7, b"x"),)), CacheKeys(media=((3, b"y"),))]
    batch = Prompts.of(prompts, keys)
    found = hasher.chain(
        batch.tokens,
        np.cumsum(batch.lengths) - batch.lengths,
        batch.lengths // 4,
        [hasher.root_of(key) for key in keys],
        {i: hasher.media_of(key) for i, key in enumerate(keys) if key},
    )
    expected = [d for p, key in zip(prompts, keys, strict=True) for d in digests_of(p, key)]
    assert [digest.tobytes() for digest in found] == expected


def test_a_chain_goes_on_from_any_block():
    hasher = PrefixHasher(4, SEED)
    tokens = np.arange(20, dtype=np.int32)
    whole = digests_of(tokens)
    rest = hasher.chain(tokens, np.array([8]), np.array([3]), [whole[1]])
    assert [digest.tobytes() for digest in rest] == whole[2:]


@pytest.mark.parametrize("block_size", [1, 4])
def test_one_more_block_of_each_sequence_is_as_in_a_chain(block_size):
    hasher = PrefixHasher(block_size, SEED)
    prompts = [[0] * 3 * block_size, list(range(3 * block_size))]
    whole = [digests_of(tokens, block_size=block_size) for tokens in prompts]
    blocks = np.array([tokens[-block_size:] for tokens in prompts], np.int32)
    found = hasher.extend(blocks, [digests[1] for digests in whole])
    assert found.dtype == np.uint64
    assert [digest.tobytes() for digest in found] == [digests[2] for digests in whole]


def test_no_blocks_have_no_digests():
    hasher = PrefixHasher(4, SEED)
    assert hasher.extend(np.empty((0, 4), np.int32), []).shape == (0, 4)
    none = np.empty(0, np.int64)
    assert hasher.chain(np.empty(0, np.int32), none, none, []).shape == (0, 4)
    assert digests_of([1, 2, 3]) == []


# -- seeds ---------------------------------------------------------------------------------


def test_equal_seeds_give_equal_digests_and_others_do_not():
    tokens = range(8)
    assert digests_of(tokens, seed=b"a") == digests_of(tokens, seed=b"a")
    assert digests_of(tokens, seed=b"a") != digests_of(tokens, seed=b"b")
    assert digests_of(tokens, seed=b"") != digests_of(tokens, seed=b"\0")


def test_hashers_without_a_seed_differ():
    hashers = [PrefixHasher(4) for _ in range(20)]
    assert len({hasher.root for hasher in hashers}) == 20
    assert {len(hasher.seed) for hasher in hashers} == {32}


@pytest.mark.parametrize("seeded", [True, False], ids=["seed", "no-seed"])
def test_only_a_seed_makes_digests_the_same_in_two_processes(seeded):
    code = (
        "from pagedattn.block_manager.prefix_hash import PrefixHasher;"
        f"print(PrefixHasher(4, {SEED if seeded else None!r}).root.hex())"
    )
    environment = dict(os.environ, PYTHONHASHSEED="0")
    roots = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, check=True, text=True, env=environment,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert (roots[0] == roots[1]) == seeded
    assert (roots[0].strip() == PrefixHasher(4, SEED).root.hex()) == seeded


# -- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [[0], [MAX_TOKEN_ID], [0, MAX_TOKEN_ID]], ids=str)
def test_token_ids_up_to_the_limits_are_accepted(limits):
    tokens = token_ids_of(limits)
    assert tokens.dtype == np.dtype("<i4")
    assert tokens.tolist() == limits


@pytest.mark.parametrize("bad", [-1, MAX_TOKEN_ID + 1, 2**40, -(2**63)])
def test_a_token_id_outside_the_limits_is_said(bad):
    message = f"a token id is {bad}; it must be from 0 to 2147483647"
    for tokens in ([bad], [1, bad, 2]):
        with pytest.raises(ValueError, match=message):
            token_ids_of(tokens)
        with pytest.raises(ValueError, match=message):
            Prompts.of([[1], tokens], None)
        with pytest.raises(ValueError, match=message):
            Prompts.of([np.array(tokens)], None)


@pytest.mark.parametrize(
    "bad", [[1.5], [True, False], "ab", [[1, 2]], [None], np.ones((2, 2), np.int64)], ids=repr
)
def test_prompts_of_something_else_than_token_ids_are_refused(bad):
    with pytest.raises(ValueError, match="a prompt's token ids must be a whole number or a flat"):
        Prompts.of([[1], bad], None)


def test_prompts_of_any_integer_type_are_joined():
    arrays = [np.array([1, 2], kind) for kind in ("i1", "u2", "i4", "i8", "u8")]
    batch = Prompts.of([*arrays, [3], range(2)], None)
    assert batch.tokens.tolist() == [1, 2] * 5 + [3, 0, 1]
    assert batch.tokens.dtype == np.int32
    assert batch.lengths.tolist() == [2] * 5 + [1, 2]
    assert list(batch.keys) == [None] * 7


def test_an_empty_prompt_is_refused_by_its_number():
    with pytest.raises(ValueError, match="prompt 1 is empty; it needs 1 token"):
        Prompts.of([[1], [], [2], []], None)


def test_a_batch_of_no_prompts_is_a_batch():
    batch = Prompts.of([], None)
    assert batch.tokens.size == batch.lengths.size == len(batch.keys) == 0


def test_one_key_is_for_all_prompts_and_a_list_for_each():
    key = CacheKeys(salt="a")
    assert list(Prompts.of([[1], [2]], key).keys) == [key, key]
    assert list(Prompts.of([[1], [2]], (None, key)).keys) == [None, key]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_keys_is_refused(count):
    with pytest.raises(ValueError, match=f"{count} keys were given for 2 prompts"):
        Prompts.of([[1], [2]], [None] * count)


@pytest.mark.parametrize("position", [2, 100])
def test_media_behind_a_prompts_end_are_refused(position):
    media = CacheKeys(media=((0, b"a"), (position, b"b")))
    with pytest.raises(ValueError, match="prompt 1 has 2 tokens, and media behind its end"):
        Prompts.of([[1, 2, 3] * 50, [1, 2]], media)


def test_media_at_a_prompts_last_token_are_accepted():
    batch = Prompts.of([[1, 2]], CacheKeys(media=((1, b"a"),)))
    assert batch.keys[0].media == ((1, b"a"),)


@pytest.mark.parametrize(
    "pair", [(-1, b"a"), (0, "a"), (0.0, b"a"), ("0", b"a"), (None, b"a"), (0, None)], ids=repr
)
def test_media_that_are_no_place_and_bytes_are_refused(pair):
    with pytest.raises(ValueError, match="media must be pairs of a position in tokens, 0 or more"):
        CacheKeys(media=((0, b"fine"), pair))
