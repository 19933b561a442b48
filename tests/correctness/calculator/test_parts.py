"""The three parts count what arithmetic says they should."""

import dataclasses

import pytest

from pagedattn.calculator import Calculation
from pagedattn.calculator.sharing import calculate_sharing
from pagedattn.calculator.users import WINDOWS, bound, calculate_users, step_time
from pagedattn.calculator.waste import PAGED, STANDARD, calculate_waste
from pagedattn.config import ModelConfig
from pagedattn.hardware import GIB, GPU
from pagedattn.memory import num_blocks_for
from pagedattn.reservation import reservation_names


def quietly(_):
    pass


def test_every_system_is_in_every_part(small):
    assert tuple(row.system for row in small.waste.systems) == reservation_names()
    assert tuple(row.system for row in small.users.systems) == reservation_names()


def test_the_standard_reservation_wastes_what_requests_do_not_hold(small):
    row = small.waste.of(STANDARD)
    slots = small.settings.budgets[0].num_slots
    assert row.num_requests == slots // 512
    assert row.waste_of_reserved == pytest.approx(1 - row.held_tokens / 512)
    assert row.held_tokens == pytest.approx(128, rel=0.05)
    assert row.shares["token_states"] == pytest.approx(row.num_requests * row.held_tokens / slots)


def test_shares_sum_to_one_and_waste_is_all_but_tokens(small):
    for row in small.waste.systems:
        assert sum(row.shares.values()) == pytest.approx(1)
        assert row.waste == pytest.approx(1 - row.shares["token_states"])
        assert row.waste_of_reserved <= row.waste + 1e-12
        assert row.reason is None


def test_paged_wastes_less_than_a_block_a_request_and_what_admission_leaves(small):
    row = small.waste.of(PAGED)
    assert 0 < row.waste_of_reserved < 16 / row.held_tokens
    assert row.waste < 0.1 < small.waste.of("orca-oracle").waste


def test_larger_blocks_waste_more(settings):
    wasted = [
        calculate_waste(settings(memory={"block_size": size}), quietly).of(PAGED).waste_of_reserved
        for size in (4, 16, 64)
    ]
    assert wasted == sorted(wasted)
    assert wasted[2] == pytest.approx(31.5 / (128 + 31.5), rel=0.1)


def test_a_system_that_cannot_hold_one_request_says_why_and_has_no_numbers(settings):
    # transformers needs room for a second copy; 600 slots hold no 2 * 512
    made = settings(kv_bytes=600 * 23_040)
    row = calculate_waste(made, quietly).of("transformers")
    assert "cannot hold one request" in row.reason
    assert (row.num_requests, row.shares, row.waste, row.waste_of_reserved) == (0, {}, None, None)
    assert calculate_users(made, quietly).of("transformers").users == {"given": None}


def test_users_that_fit_follow_from_the_memory(small):
    whole, rest = small.settings.budgets
    standard, paged = small.users.of(STANDARD).users, small.users.of(PAGED).users
    for budget in (whole, rest):
        assert standard[budget.name] == budget.num_slots // 512
        assert paged[budget.name] == pytest.approx(0.99 * budget.num_slots / 135.5, rel=0.05)
    order = ["transformers", "orca-max", "orca-pow2", "orca-oracle", "paged"]
    users = [small.users.of(name).users["without-weights"] for name in order]
    assert users == sorted(users)


def test_more_users_at_once_make_more_tokens_a_second_but_never_more_than_the_bound(small):
    names = ["orca-max", "orca-pow2", "orca-oracle", "paged"]
    rows = [small.users.of(name) for name in names]
    for row in rows:
        assert 0 < row.mean_running <= 1.02 * row.users["after-weights"]
        assert row.tokens_per_s <= 1.05 * bound(small.settings, row.mean_running)
    rates = [row.tokens_per_s for row in rows]
    assert rates == sorted(rates)
    assert small.users.of("flexgen").tokens_per_s < min(rates)


def test_a_step_reads_weights_and_kv_once(small):
    times = step_time(small.settings)
    assert times.fixed == pytest.approx(2 * 134_515_008 / 100e9)
    assert times.per_stored_token == pytest.approx(23_040 / 100e9)
    assert times.per_token == pytest.approx(2 * 134_515_008 / 10e12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": GPU("plain", GIB // 2)}, "the bandwidth of plain is not known"),
        (
            {"model": dataclasses.replace(ModelConfig.preset("smollm2-135m"), num_parameters=None)},
            "the weights of smollm2-135m are not known",
        ),
        ({"weight_bytes": GIB}, "the weights leave no memory for a request"),
    ],
)
def test_without_what_a_step_costs_there_is_no_run_and_a_reason(settings, changes, reason):
    users = calculate_users(settings(**changes), quietly)
    assert reason in users.no_run
    assert users.of(PAGED).users["without-weights"] > 0
    assert all(row.tokens_per_s is row.mean_running is None for row in users.systems)


def test_blocks_that_leave_a_window_make_room_for_more_users(windowed, small):
    assert WINDOWS not in {row.system for row in small.users.systems}
    with_windows = windowed.users.of(WINDOWS).users["without-weights"]
    without = windowed.users.of(PAGED).users["without-weights"]
    settings = windowed.settings
    held = settings.memory.bytes_of(128)
    assert held < 0.85 * 8 * settings.memory.bytes_per_block
    assert 1.2 * without < with_windows < 1.6 * without
    assert any("keep all tokens" in note for note in windowed.notes)


def test_a_window_beyond_the_longest_request_changes_nothing(settings):
    model = ModelConfig.preset("smollm2-135m")
    wide = dataclasses.replace(model, layer_types=("sliding_attention",) * 30, sliding_window=512)
    users = calculate_users(settings(model=wide), quietly)
    assert tuple(row.system for row in users.systems) == reservation_names()


def test_a_shared_prompt_is_kept_once_in_whole_blocks(small):
    # 50 tokens fill 3 blocks of 16; the other 2 and 10 own tokens take a block each
    total = small.sharing.total
    assert (total.separate, total.shared) == (10 * 4, 3 + 10 * 1)
    assert total.saved == pytest.approx(1 - 13 / 40)
    assert small.sharing.saved_tokens == pytest.approx(1 - (50 + 100) / 600)
    assert [row.num_users for row in small.sharing.by_users] == list(range(1, 11))
    for row in small.sharing.by_users:
        assert (row.separate, row.shared) == (4 * row.num_users, 3 + row.num_users)


def test_the_last_token_of_a_prompt_is_never_shared(settings):
    # 15 + 1 tokens are exactly a block, whose last token differs from user to user
    made = settings(system_prompt_tokens=15, own_tokens=1)
    assert calculate_sharing(made, quietly).total.saved == 0


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_blocks_that_the_shared_prompt_fills_save_most(settings, block_size):
    sharing = calculate_sharing(settings(memory={"block_size": block_size}), quietly)
    for row in sharing.by_block_size:
        each, full = num_blocks_for(60, row.block_size), 50 // row.block_size
        assert row.shared == full + 10 * (each - full)
        assert row.saved <= sharing.saved_tokens + 1e-12
    assert block_size in [row.block_size for row in sharing.by_block_size]
    if 50 % block_size == 0:
        assert sharing.total.saved == pytest.approx(sharing.saved_tokens)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(settings, small):
    again = Calculation.of(settings(), quietly)
    assert again.to_json() == small.to_json()
    other = calculate_waste(settings(seed=1), quietly)
    assert other.of(STANDARD).held_tokens != small.waste.of(STANDARD).held_tokens


def test_progress_names_each_part(settings):
    told = []
    Calculation.of(settings(), told.append)
    for part in ("waste: paged", "users: orca-max", "throughput: tgi", "sharing: blocks of 16"):
        assert part in told
