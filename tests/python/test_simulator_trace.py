"""Readers of traces: the public formats, and what is wrong with a line."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import InvalidSpec
from pagedkv.simulator import Request, Trace, read_trace

MOONCAKE = """\
{"timestamp": 27000, "input_length": 700, "output_length": 12, "hash_ids": [0, 5]}
{"timestamp": 27482, "input_length": 512, "output_length": 1, "hash_ids": [0]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_mooncake(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, MOONCAKE))
    assert trace.has_hash_ids
    first, second = trace.requests
    assert first == Request(0.0, 700, 12, (0, 5))
    assert second == Request(second.arrival, 512, 1, (0,))
    assert second.arrival == pytest.approx(0.482)


def test_azure(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE))
    assert not trace.has_hash_ids
    assert [(r.input_length, r.output_length) for r in trace.requests] == [(374, 44), (396, 109)]
    assert trace.requests[0].arrival == 0
    assert trace.requests[1].arrival == pytest.approx(4.314579, abs=1e-5)


@pytest.mark.parametrize("text", [MOONCAKE, AZURE])
def test_gzip_is_found_by_its_content(tmp_path: Path, text: str) -> None:
    plain = read_trace(write(tmp_path, text))
    assert read_trace(write(tmp_path, gzip.compress(text.encode()))) == plain


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        ("input_length,output_length\n5,6\n5,6\n", [0, 0]),
        ("arrival,input_length,output_length\n3,5,6\n1.5,5,6\n", [0, 1.5]),
        ("Timestamp,Model,Request tokens,Response tokens\n5,GPT,5,6\n45,GPT,5,6\n", [0, 40]),
        ("\ufeffoutput_length, Input_Length ,time\r\n6,5,0\r\n\r\n6,5,2\r\n", [0, 2]),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 23:59:59.5+00:00,5,6\n"
            "2024-05-11 00:00:01+00:00,5,6\n",
            [0, 1.5],
        ),
        ('{"prompt_tokens": 5, "completion_tokens": 6}\n\n{"input": 5, "output": 6}', [0, 0]),
        ('{"arrival": 2, "input": 5, "output": 6}\n{"arrival": 1.5, "input": 5, "output": 6}',
         [0, 0.5]),
    ],
)  # fmt: skip
def test_generic_files(tmp_path: Path, text: str, arrivals: list[float]) -> None:
    requests = read_trace(write(tmp_path, text)).requests
    assert [r.arrival for r in requests] == pytest.approx(arrivals)
    assert {(r.input_length, r.output_length) for r in requests} == {(5, 6)}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "expected a JSON object"),
        ("[1, 2]", "expected a JSON object"),
        ('{"input_length": 5}', "no output_length"),
        ('{"output_length": 5}', "no input_length"),
        ('{"input_length": 0, "output_length": 5}', "input_length is 0"),
        ('{"input_length": -4, "output_length": 5}', "input_length is -4"),
        ('{"input_length": 5, "output_length": -1}', "output_length is -1"),
        ('{"input_length": true, "output_length": 5}', "input_length is True"),
        ('{"input_length": 5.5, "output_length": 5}', "input_length is 5.5"),
        ('{"input_length": "5x", "output_length": 5}', "input_length is '5x'"),
        ('{"input_length": 99999999999, "output_length": 5}', "input_length is 99999999999"),
        ('{"input_length": 5, "output_length": 5, "timestamp": "soon"}', "time is 'soon'"),
        ('{"input_length": 5, "output_length": 5, "timestamp": NaN}', "time is nan"),
        ('{"input_length": 5, "output_length": 5, "arrival": 1e300}', "time is 1e"),
        ('{"input_length": 5, "output_length": 5, "arrival": [1]}', "time is"),
        ('{"input_length": 5, "output_length": 5, "hash_ids": [1, 2]}', "2 hash_ids for 5 tokens"),
        ('{"input_length": 600, "output_length": 5, "hash_ids": [1]}', "1 hash_ids for 600"),
        ('{"input_length": 5, "output_length": 5, "hash_ids": ["a"]}', "not a list of integers"),
        ('{"input_length": 5, "output_length": 5, "hash_ids": 7}', "not a list of integers"),
        ("[" * 100_000, "expected a JSON object"),
    ],
)
def test_a_broken_line_is_named_or_left_out(tmp_path: Path, line: str, words: str) -> None:
    good = '{"input_length": 5, "output_length": 6}'
    path = write(tmp_path, f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(InvalidSpec, match="line 3: ") as caught:
        read_trace(path)
    assert words in str(caught.value)
    trace = read_trace(path, skip_broken=True)
    assert (len(trace.requests), trace.num_skipped) == (2, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5,6\n7,8\n", "line 1: expected JSON, or a CSV header"),
        ("input_length,size\n7,8\n", "line 1: expected JSON, or a CSV header"),
        ("input_length,output_length\n5,6\n5\n", "line 3: expected a JSON object, or as many"),
        ("input_length,output_length\n5,6\n5,6,7\n", "line 3: expected a JSON object, or as many"),
        ("input_length,output_length\n5,\n", "line 2: output_length is ''"),
        ("time,input_length,output_length\n2023-99-99 00:00:00,5,6\n", "line 2: the time is"),
        ("input_length,output_length\n", "has no request in it"),
        ("", "has no request in it"),
        (b"\x1f\x8bnot gzip", "neither text in UTF-8 nor gzip"),
        (gzip.compress(AZURE.encode())[:-9], "neither text in UTF-8 nor gzip"),
        (b"\xff\xfe\x00", "neither text in UTF-8 nor gzip"),
    ],
)
def test_broken_files(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(InvalidSpec, match=re.escape(words)):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([(0.0, 0, 1)], "input_length is 0"),
        ([(0.0, 1, -1)], "output_length is -1"),
        ([(math.nan, 1, 1)], "arrival is nan"),
        ([(1.0, 1, 1), (0.0, 1, 1)], "not in the order of their arrival"),
        ([(0.0, 600, 1, (1,))], "1 hash_ids for 600 tokens, expected one for every 512"),
    ],
)
def test_traces_made_in_python_are_checked(requests: list, words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        Trace("mine", tuple(Request(*row) for row in requests))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="No such file"):
        read_trace(tmp_path / "nowhere")
    with pytest.raises(InvalidSpec, match="directory"):
        read_trace(tmp_path)
    with pytest.raises(InvalidSpec, match="hash_block_size is 0"):
        read_trace(write(tmp_path, MOONCAKE), hash_block_size=0)


def test_a_trace_of_broken_lines_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="no request in it \\(2 broken lines\\)"):
        read_trace(write(tmp_path, "{\n{\n"), skip_broken=True)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(0, 10**6)), min_size=1)
)
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    """In both formats, in the order of arrival."""
    folder = tmp_path_factory.mktemp("traces")
    lines = [json.dumps({"arrival": t, "input_length": i, "output_length": o}) for t, i, o in rows]
    table = ["arrival,input_length,output_length", *(f"{t!r},{i},{o}" for t, i, o in rows)]
    first = min(t for t, _, _ in rows)
    expected = [(t - first, i, o) for t, i, o in sorted(rows, key=lambda row: row[0])]
    for text in ("\n".join(lines), "\n".join(table)):
        requests = read_trace(write(folder, text)).requests
        assert [(r.arrival, r.input_length, r.output_length) for r in requests] == expected


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_trace_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("bytes"), b"input_length,output_length\n" + data)
    try:
        message = "" if read_trace(path, skip_broken=True).requests else "no requests"
    except InvalidSpec as error:
        message = str(error).replace(str(path), "")
    assert message == "" or re.search("line|no request|neither text", message)
