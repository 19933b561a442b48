"""The tidy table: every column is defined once, and CSV and Parquet give back what was loaded."""

import csv
import json
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
from pyarrow import parquet

from pagedattn.report import DEFINITIONS, load, read_csv
from pagedattn.report.columns import SAMPLES_COLUMN
from pagedattn.report.data import write_tables
from pagedattn.report.results import load_run
from pagedattn.report.rows import Row

ROOT = Path(__file__).parents[3]
REAL = sorted(ROOT.glob("figures/*/results.json"))


def tables(path, folder):
    """What `load` returns of a results file, its CSV, and its Parquet file with the samples."""
    folder.mkdir()
    write_tables(load_run([path]), folder)
    return load(path), read_csv(folder / "rows.csv"), pd.read_parquet(folder / "rows.parquet")


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.parent.name)
def test_csv_and_parquet_of_a_real_run_read_back_equal(path, tmp_path):
    loaded, from_csv, from_parquet = tables(path, tmp_path / "out")
    pd.testing.assert_frame_equal(from_csv, loaded, check_exact=True)
    samples = from_parquet.pop("samples_us")
    pd.testing.assert_frame_equal(from_parquet, loaded, check_exact=True)
    for row, kept in zip(load_run([path]).rows, samples, strict=True):
        assert tuple(kept) == row.samples_us


def test_every_field_of_a_row_is_a_column_of_its_type_and_in_its_order():
    others = {"pool_over_time", SAMPLES_COLUMN.name}
    dtypes = {"str": "string", "int": "Int64", "float": "float64"}
    expected = {
        field.name: dtypes[field.type.removesuffix(" | None")]
        for field in fields(Row)
        if field.name not in others
    }
    assert [(c.name, c.dtype) for c in DEFINITIONS.values()] == list(expected.items())


def test_every_column_says_its_unit_and_has_a_sentence(made, tmp_path):
    table = load(made.write(tmp_path / "run.json", made.small()))
    assert list(table.columns) == list(DEFINITIONS)
    for name, column in DEFINITIONS.items():
        assert str(table[name].dtype) == column.dtype
        assert column.name == name
        assert column.unit == "-" if column.dtype == "string" else column.unit not in ("", "-")
        assert column.meaning.endswith(".")
        assert column.unit == "µs" or not name.endswith("_us")
        assert column.unit == "bytes" or not name.endswith("bytes")


def test_the_document_has_the_columns_as_they_are_defined():
    text = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    columns = [*DEFINITIONS.values(), SAMPLES_COLUMN]
    assert lines == [f"| `{c.name}` | {c.dtype} | {c.unit} | {c.meaning} |" for c in columns]


def test_what_a_benchmark_does_not_say_is_missing_in_every_form(made, tmp_path):
    names = {"area": "attention", "implementation": "a", "workload": "w"}
    rows = [
        made.benchmark("x", 1e-3, **names, kind="", error=0.5),
        made.benchmark("y", 2e-3, **names, kind="decode", batch=2**53),
    ]
    path = made.write(tmp_path / "run.json", made.file(rows))
    loaded, *others = tables(path, tmp_path / "out")
    for table in (loaded, *others):
        missing = table[["kind", "batch", "error"]].isna().to_numpy().tolist()
        assert missing == [[False, False, True], [True, True, False]]
        assert (table.kind[0], table.batch[0], table.error[1]) == ("decode", 2**53, 0.5)
    assert parquet.read_table(tmp_path / "out" / "rows.parquet")["error"].null_count == 1


@pytest.mark.parametrize(
    "name", ["NA", "nan", "None", "null", "1", "true", "'x", '"', "a,b", "é漢"]
)
def test_text_that_looks_like_something_else_stays_text(made, tmp_path, name):
    row = made.benchmark("x", 1e-3, area="attention", implementation=name, workload=name)
    path = made.write(tmp_path / "run.json", made.file([row]))
    for table in tables(path, tmp_path / "out"):
        assert table.implementation.tolist() == table.workload.tolist() == [name]


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "'", "\t=", "\r=", " ="])
def test_no_cell_of_the_csv_is_a_formula(made, tmp_path, first):
    name = f"{first}cmd|' /C calc'!A0"
    names = dict.fromkeys(("area", "implementation", "workload", "device", "kind"), name)
    row = made.benchmark("x", 1e-3, **names) | {"fullname": name}
    path = made.write(tmp_path / "run.json", made.file([row]))
    loaded, from_csv, _ = tables(path, tmp_path / "out")
    pd.testing.assert_frame_equal(from_csv, loaded)
    with (tmp_path / "out" / "rows.csv").open(encoding="utf-8", newline="") as file:
        (cells,) = list(csv.DictReader(file))
    assert cells["workload"] == f"'{name.strip()}"
    assert not any(cell[:1] in ("=", "+", "-", "@", "\t", "\r") for cell in cells.values())


def test_the_parquet_file_says_where_it_was_measured_and_in_what_units(made, tmp_path):
    path = made.write(tmp_path / "run.json", made.small())
    write_tables(load_run([path]), tmp_path)
    schema = parquet.read_schema(tmp_path / "rows.parquet")
    (about,) = json.loads(schema.metadata[b"pagedattn"])
    assert about["file"] == "run.json"
    assert about["environment"]["GPU"] == "NVIDIA H100 80GB HBM3"
    assert about["environment"]["driver"] == "580.65.06"
    for column in (*DEFINITIONS.values(), SAMPLES_COLUMN):
        told = schema.field(column.name).metadata
        assert told[b"unit"].decode() == column.unit
        assert told[b"meaning"].decode() == column.meaning
