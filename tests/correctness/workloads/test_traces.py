"""Trace loaders, on small files in the published formats."""

import json

import pytest

from pagedattn.workloads import Request, TraceError, load_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE = [
    HEADER,
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:50.9951690,396,109",
    "2023-11-16 18:16:00.0000001,91,16",
]


def azure_file(folder, lines, ending="\r\n"):
    path = folder / "azure.csv"
    path.write_bytes("".join(line + ending for line in lines).encode())
    return path


def mooncake_file(folder, *rows):
    path = folder / "mooncake.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mooncake_row(**changes):
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    return row | changes


def assert_refused(path, *parts):
    with pytest.raises(TraceError) as error:
        load_trace(path)
    message = str(error.value)
    assert message.endswith(".")
    assert ". " not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("ending", ["\r\n", "\n"], ids=["CRLF", "LF"])
def test_azure_stamps_of_seven_digits_become_seconds_from_the_first(tmp_path, ending):
    requests = load_trace(azure_file(tmp_path, AZURE, ending))
    assert [request.arrival_s for request in requests] == pytest.approx(
        [0.0, 4.314579, 13.3194101], abs=1e-9
    )
    assert [request.prompt_tokens for request in requests] == [374, 396, 91]
    assert [request.output_tokens for request in requests] == [44, 109, 16]
    assert {request.prefix_hashes for request in requests} == {()}


def test_a_byte_order_mark_blank_lines_and_a_missing_last_newline_are_harmless(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(AZURE).encode())
    assert len(load_trace(str(path))) == 3


def test_a_second_without_a_fraction_is_read(tmp_path):
    lines = [HEADER, "2023-11-16 23:59:59,1,1", "2023-11-17 00:00:01.5,1,1"]
    assert load_trace(azure_file(tmp_path, lines))[1].arrival_s == 2.5


def test_mooncake_milliseconds_become_seconds_and_hashes_a_tuple(tmp_path):
    path = mooncake_file(
        tmp_path,
        mooncake_row(),
        mooncake_row(timestamp=1500, input_length=512, hash_ids=[7]),
        mooncake_row(timestamp=1500, input_length=1, hash_ids=[]),
    )
    assert load_trace(path) == [
        Request(0.0, 600, 5, (0, 1)),
        Request(1.5, 512, 5, (7,)),
        Request(1.5, 1, 5, ()),
    ]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("2023-11-16 18:15:51.0000000,374", "3 fields, not 2"),
        ("2023-11-16 18:15:51.0000000,374,44,1", "3 fields, not 4"),
        ("2023-11-16 18:15:51.0000000,x,44", "ContextTokens must be an integer, 1 or more"),
        ("2023-11-16 18:15:51.0000000,0,44", "ContextTokens must be an integer, 1 or more, not 0"),
        ("2023-11-16 18:15:51.0000000,5,-44", "GeneratedTokens must be an integer"),
        ("2023-11-16 18:15:51.0000000,5,1_0", "GeneratedTokens must be an integer"),
        ("2023-13-16 18:15:51.0000000,5,44", "TIMESTAMP must be like"),
        ("16.11.2023,5,44", "TIMESTAMP must be like"),
        ("2023-11-16 18:15:50.9951689,5,44", "must not arrive before the one above"),
    ],
)
def test_a_bad_azure_line_is_refused_with_its_number(tmp_path, line, part):
    assert_refused(azure_file(tmp_path, [*AZURE[:3], line]), "azure.csv, line 4", part)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"timestamp": "0"}, "timestamp must be milliseconds"),
        ({"timestamp": -1}, "timestamp must be milliseconds"),
        ({"timestamp": True}, "timestamp must be milliseconds"),
        ({"timestamp": float("nan")}, "timestamp must be milliseconds"),
        ({"timestamp": 10**400}, "timestamp must be milliseconds"),
        ({"timestamp": 2}, "must not arrive before the one above"),
        ({"input_length": 0}, "input_length must be an integer, 1 or more, not 0"),
        ({"output_length": 1.5}, "output_length must be an integer, 1 or more, not 1.5"),
        ({"output_length": True}, "output_length must be an integer"),
        ({"hash_ids": "01"}, "hash_ids must be a list of integers"),
        ({"hash_ids": [0, True]}, "hash_ids must be a list of integers"),
        ({"hash_ids": [0]}, "hash_ids must hold 2 ids for 600 tokens, not 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_mooncake_line_is_refused_with_its_number(tmp_path, changes, part):
    path = mooncake_file(tmp_path, mooncake_row(timestamp=3), mooncake_row(timestamp=4) | changes)
    assert_refused(path, "mooncake.jsonl, line 2", part)


@pytest.mark.parametrize("key", ["timestamp", "input_length", "output_length"])
def test_a_missing_mooncake_key_is_named(tmp_path, key):
    row = mooncake_row()
    del row[key]
    assert_refused(mooncake_file(tmp_path, row), "line 1", f"{key} is missing")


@pytest.mark.parametrize("line", ["{", "[1]", '{"timestamp": 0'])
def test_a_mooncake_line_that_is_no_object_is_refused(tmp_path, line):
    path = mooncake_file(tmp_path, mooncake_row())
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line, encoding="utf-8")
    assert_refused(path, "line 3", "it must be a JSON object")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "it is empty"),
        (b"\r\n\r\n", "it is empty"),
        (HEADER.encode(), "only a header"),
        (b"a,b,c\n1,2,3\n", "line 1: the first line must be the header"),
        (b"\xff\xfe\x00", "must be UTF-8"),
    ],
)
def test_a_file_in_neither_format_is_refused(tmp_path, content, part):
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert_refused(path, part)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert_refused(tmp_path / "none.csv", "none.csv", "No such file")
