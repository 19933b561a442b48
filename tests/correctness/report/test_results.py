"""Reading results: what is taken from a file, what is refused, and in what words."""

import copy
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedattn.report import ResultsError, load
from pagedattn.report.results import COLUMNS, load_run, newest_file


def test_a_row_has_its_times_in_microseconds_and_its_rates(made, tmp_path):
    table = load(made.write(tmp_path / "run.json", made.small()))
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 4
    row = table[(table.workload == "decode-B8-4k") & (table.implementation == "triton")].iloc[0]
    assert row.median_us == pytest.approx(400)
    assert row.min_us <= row.q1_us <= row.median_us <= row.q3_us <= row.max_us
    # 150 MB in 400 µs are 375 GB/s, of 3087; 0.6 GFLOP in 400 µs are 1.5 TFLOP/s
    assert row.gb_per_s == pytest.approx(375)
    assert row.share_of_bandwidth == pytest.approx(375 / 3087)
    assert row.tflop_per_s == pytest.approx(1.5)
    assert (row.batch, row.context, row.rounds) == (8, 4096, 20)
    assert table.num_sequences.isna().all()


def test_a_file_with_raw_samples_reads_like_one_without(made, tmp_path):
    with_data = made.write(tmp_path / "a" / "run.json", made.h100(with_data=True))
    without = made.write(tmp_path / "b" / "run.json", made.h100(with_data=False))
    assert without.stat().st_size < with_data.stat().st_size
    assert load(with_data).equals(load(without))


def test_given_rates_are_kept_as_they_are(made, tmp_path):
    benchmark = made.benchmark(
        "x", 1e-3, area="attention", implementation="a", workload="w", bytes=1000, gb_per_s=7.5
    )
    table = load(made.write(tmp_path / "run.json", made.file([benchmark])))
    assert table.gb_per_s.tolist() == [7.5]
    assert table.device.tolist() == ["unknown"]


def test_a_later_file_replaces_rows_of_the_same_name(made, tmp_path):
    first = made.small()
    second = copy.deepcopy(first)
    second["benchmarks"] = second["benchmarks"][:1]
    second["benchmarks"][0]["stats"] = made.benchmark("x", 55e-6)["stats"]
    paths = [
        made.write(tmp_path / f"{i}.json", content) for i, content in enumerate((first, second))
    ]
    run = load_run(paths)
    assert run.num_replaced == 1
    assert len(run.rows) == 4
    changed = [row for row in run.rows if row.file == "1.json"]
    assert [row.median_us for row in changed] == pytest.approx([55])


def test_rows_of_other_suites_are_skipped_and_counted(made, tmp_path):
    content = made.small()
    for broken in ({}, {"area": "attention", "workload": "w"}, {"area": 3}):
        content["benchmarks"].append(made.benchmark("foreign", 1e-3) | {"extra_info": broken})
    content["benchmarks"].append({"name": "no extra_info", "stats": None})
    run = load_run([made.write(tmp_path / "run.json", content)])
    assert (len(run.rows), run.num_skipped) == (4, 4)


def test_a_file_with_only_rows_of_other_suites_is_refused(made, tmp_path):
    row = made.benchmark("foreign", 1e-3)
    for rows, message in (
        ([row], r"The only benchmark in .* does not have .* area, implementation"),
        ([row] * 2, r"None of the 2 benchmarks in .* has .* area, implementation"),
    ):
        with pytest.raises(ResultsError, match=message):
            load(made.write(tmp_path / "run.json", made.file(rows)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("no json", "is not valid JSON"),
        ('{"benchmarks": [', "is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"benchmarks": [NaN], "machine_info": {}}', "NaN is no JSON number"),
        ("[]", "is not a results file of pytest-benchmark"),
        ("3", "is not a results file of pytest-benchmark"),
        ('{"a": 1}', "is not a results file of pytest-benchmark"),
        ('{"benchmarks": {}, "machine_info": {}}', "is not a results file of pytest-benchmark"),
        ('{"benchmarks": [], "machine_info": {}}', "holds no benchmarks"),
        ('{"benchmarks": [1], "machine_info": {}}', "each of benchmarks must be a JSON object"),
        ('{"benchmarks": [{}], "machine_info": 1}', "machine_info must be a JSON object, not 1"),
        ('{"benchmarks": [{}], "machine_info": {"pagedattn": "x"}}', 'JSON object, not "x"'),
    ],
    ids=lambda value: value[:24],
)
def test_what_is_no_results_file_is_refused_in_a_sentence(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_different_machines_are_joined_with_a_warning(made, tmp_path):
    one = made.write(tmp_path / "one.json", made.small())
    other = made.write(tmp_path / "other.json", made.file(made.cpu()["benchmarks"], uuid="bb"))
    with pytest.warns(
        UserWarning, match=r"one\.json and .*other\.json come from different"
    ) as told:
        table = load([one, other])
    assert len(table) == len(load(one)) + len(load(other))
    assert told[0].filename == __file__


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path):
    with pytest.raises(ResultsError, match="does not exist"):
        load(tmp_path / "absent.json")
    with pytest.raises(ResultsError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00\x80\x81")
    with pytest.raises(ResultsError, match="is not valid JSON"):
        load(tmp_path / "bytes.json")
    with pytest.raises(ResultsError, match="give at least one"):
        load([])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(made, tmp_path):
    path = made.write(tmp_path / "run.json", made.small())
    path.chmod(0)
    with pytest.raises(ResultsError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("stats", "median", "fast", 'stats.median must be a number from 0 to 1e.18, not "fast"'),
        ("stats", "median", None, "stats.median must be a number from 0 to 1e.18, not null"),
        ("stats", "median", True, "not true"),
        ("stats", "median", 0, "times above 0"),
        ("stats", "median", 1e9, "times above 0 and up to"),
        ("stats", "median", -1.0, "stats.median must be a number from 0"),
        ("stats", "q1", 1.0, "must have q1 up to median"),
        ("stats", "rounds", 0, "stats.rounds must be 1 or more"),
        ("stats", "rounds", 1.5, "stats.rounds must be a whole number, not 1.5"),
        ("extra_info", "batch", "many", 'batch must be a number from 0 to 1e.18, not "many"'),
        ("extra_info", "gb_per_s", [1], "gb_per_s must be a number from 0 to 1e.18, not a list"),
        ("extra_info", "batch_us", -1.0, "batch_us must be a number from 0 to 1e.18, not -1.0"),
        ("extra_info", "plan_us", -1e19, "plan_us must be a number from -1e.18 to 1e.18"),
        ("extra_info", "bytes", 10**400, "not a larger number"),
        ("stats", "data", [1e-300, 3e-4, 3e-4], "stats.data must be 0 or a number from 1e-30 to"),
        ("extra_info", "limit_us", 1e-300, "limit_us must be 0 or a number from 1e-30 to 1e.18"),
        ("extra_info", "flops", 5e-324, "flops must be 0 or a number from 1 to 1e.18, not 5e-324"),
        ("extra_info", "kv_pool_bytes", 0.5, "kv_pool_bytes must be 0 or a number from 1 to"),
        ("extra_info", "last_block_waste", 1.5, "last_block_waste must be a number from 0 to 1, "),
        ("extra_info", "prefix_hit_rate", 1.5, "prefix_hit_rate must be a number from 0 to 1, "),
        ("extra_info", "dtype", 16, "dtype must be a string, not 16"),
    ],
)
def test_a_broken_row_is_refused_by_name(made, tmp_path, place, key, value, message):
    content = made.small()
    content["benchmarks"][2][place][key] = value
    path = made.write(tmp_path / "run.json", content)
    with pytest.raises(ResultsError, match=message) as caught:
        load(path)
    assert "attention[sdpa_contiguous-decode-B8-4k]" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_cpus": 10**400}, "machine_info.pagedattn.num_cpus must be a number from 0"),
        ({"num_cpus": 1.5}, "machine_info.pagedattn.num_cpus must be a whole number, not 1.5"),
        ({"cpu": {"load_1min": 10**400}}, "cpu.load_1min must be a number from 0 to 1e.18, not"),
        ({"gpu": {"sm_clock_mhz": 1e300}}, "machine_info: SM clock must be a number from"),
    ],
)
def test_an_odd_number_about_the_machine_is_refused(made, tmp_path, changes, message):
    content = made.small()
    content["machine_info"]["pagedattn"] |= changes
    with pytest.raises(ResultsError, match=message):
        load(made.write(tmp_path / "run.json", content))


def test_a_difference_of_times_may_be_below_0(made, tmp_path):
    content = made.small()
    content["benchmarks"][2]["extra_info"]["plan_us"] = -8.5
    frame = load(made.write(tmp_path / "run.json", content))
    assert frame.plan_us.dropna().tolist() == [-8.5]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(made, tmp_path, number):
    content = made.small()
    content["benchmarks"][0]["extra_info"]["error"] = "HERE"
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content).replace('"HERE"', number), encoding="utf-8")
    with pytest.raises(ResultsError, match=r"run\.json"):
        load(path)


def test_the_newest_run_is_the_last_written_then_the_last_by_name(tmp_path):
    assert newest_file(tmp_path / "absent") is None
    folder = tmp_path / "Linux-CPython-3.11-64bit"
    folder.mkdir()
    for name, seconds in (("0001_a.json", 300), ("0002_b.json", 200), ("0003_c.json", 300)):
        (folder / name).write_text("{}")
        os.utime(folder / name, (seconds, seconds))
    (folder / "notes.json").write_text("{}")
    assert newest_file(tmp_path) == folder / "0003_c.json"


_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def _replace_somewhere(draw, content):
    """Put a drawn value in a drawn place of nested objects and lists."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = draw(st.sampled_from(keys))
        child = content[key]
        if not isinstance(child, dict | list) or not child or draw(st.integers(0, 4)) == 0:
            content[key] = draw(_values)
            return
        content = child


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_with_a_sentence(made, tmp_path, data):
    content = copy.deepcopy(made.small())
    for _ in range(data.draw(st.integers(0, 3))):
        _replace_somewhere(data.draw, content)
    text = json.dumps(content).encode()
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    elif data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(text) - 1))
        text = text[:place] + data.draw(st.binary(max_size=3)) + text[place + 1 :]
    path = tmp_path / "mutated.json"
    path.write_bytes(text)
    message = _refusal(path)
    assert message is None or (message.endswith(".") and "\n" not in message)


def _refusal(path):
    """Read a file; return why it is refused, or None."""
    try:
        assert len(load(path)) >= 1
    except ResultsError as error:
        return str(error)
    return None
