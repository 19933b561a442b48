"""PagedAttention (arXiv 2309.06180), section 3 and Table 1: memory for KV and the slots it holds.

The table's «GB» are GiB: 12 GiB of OPT-13B's 819,200 bytes a token are 15,728 slots, printed as
15.7K, where 12e9 bytes would be 14,648.
"""

import pytest

from pagedattn.config import ModelConfig
from pagedattn.memory import kv_bytes_per_token, num_blocks_in

GIB = 2**30


def num_slots(name, gib):
    return num_blocks_in(gib * GIB, ModelConfig.preset(name), block_size=1)


def test_section_3_opt_13b_takes_800_kib_a_token_and_1_6_gb_for_2048():
    num_bytes = kv_bytes_per_token(ModelConfig.preset("opt-13b"))
    assert num_bytes == 2 * 5120 * 40 * 2 == 800 * 2**10
    assert f"{2048 * num_bytes / GIB:.1f}" == "1.6"


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [("opt-13b", 819_200), ("opt-66b", 2_359_296), ("opt-175b", 4_718_592)],
)
def test_each_columns_model_takes_these_bytes_a_token(name, num_bytes):
    assert kv_bytes_per_token(ModelConfig.preset(name)) == num_bytes


@pytest.mark.parametrize(
    ("name", "gib", "slots", "printed"),
    [("opt-13b", 12, 15_728, "15.7K"), ("opt-175b", 264, 60_074, "60.1K")],
)
def test_the_13b_and_175b_columns_follow_from_the_printed_memory(name, gib, slots, printed):
    assert num_slots(name, gib) == slots
    assert f"{slots / 1000:.1f}K" == printed


def test_the_66b_columns_memory_is_rounded_from_about_21_3():
    # 21 GiB exactly would be printed as 9.6K. The printed 9.7K is 9650 to 9750 slots, so that the
    # memory lies between 21.2 and 21.5 GiB, which is printed as 21.
    assert f"{num_slots('opt-66b', 21) / 1000:.1f}K" == "9.6K"
    token_gib = kv_bytes_per_token(ModelConfig.preset("opt-66b")) / GIB
    least, most = 9650 * token_gib, 9750 * token_gib
    assert (round(least, 2), round(most, 2)) == (21.2, 21.42)
    assert f"{least:.0f}" == f"{most:.0f}" == "21"
    assert num_slots("opt-66b", 21.3) == 9693


def test_decimal_gigabytes_would_not_give_the_printed_slots():
    for name, gigabytes, printed in [("opt-13b", 12, "15.7K"), ("opt-175b", 264, "60.1K")]:
        slots = num_blocks_in(gigabytes * 10**9, ModelConfig.preset(name), block_size=1)
        assert f"{slots / 1000:.1f}K" != printed
