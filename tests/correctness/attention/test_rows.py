"""Rows of a test marked `pairs`: every two values on each device, and the others are nightly."""

import importlib.util
import itertools
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("rows", Path(__file__).parent / "conftest.py")
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)

AXES = {
    "on": [
        ("cpu", "float16"),
        ("cpu", "float32"),
        *[("cuda", "bfloat16")] * 2,
        ("cuda", "float16"),
    ],
    "kind": ["decode", "prefill", "mixed"],
    "options": {"plain": {}, "window": {"window": 20}},
    "block_size": [1, 16, 100],
}


def marked(rows, name):
    return [row for row in rows if any(mark.name == name for mark in row.marks)]


def product_on(device):
    on = {value for value in AXES["on"] if value[0] == device}
    return set(itertools.product(on, AXES["kind"], ["plain", "window"], AXES["block_size"]))


def values(rows):
    names = {id(value): name for name, value in AXES["options"].items()}
    return {(on, kind, names[id(options)], size) for on, kind, options, size in rows}


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("every", [False, True])
def test_every_two_values_meet_on_each_device(device, every):
    rows = list(conftest.rows_of(AXES, every))
    usual = [row.values for row in rows if row not in marked(rows, "nightly")]
    here = {row for row in values(usual) if row[0][0] == device}
    assert pairs(here) == pairs(product_on(device))
    assert len(here) < len(product_on(device))


def test_the_other_combinations_are_marked_nightly_and_are_there_only_if_asked_for():
    assert marked(list(conftest.rows_of(AXES, every=False)), "nightly") == []
    rows = list(conftest.rows_of(AXES, every=True))
    assert marked(rows, "nightly")
    assert values(row.values for row in rows) == product_on("cpu") | product_on("cuda")
    assert len({row.id for row in rows}) == len(rows)


def test_rows_on_a_gpu_are_marked_so():
    rows = list(conftest.rows_of(AXES, every=True))
    assert {row.values[0][0] for row in marked(rows, "gpu")} == {"cuda"}
    others = [row for row in rows if row not in marked(rows, "gpu")]
    assert {row.values[0][0] for row in others} == {"cpu"}
