"""Reading files of events, whatever their form."""

import csv
import gzip
import io
import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cli.access_log import LineRefused
from cli.records import MAX_LINE_BYTES, Columns, FileRefused, Records

ADA = {"event": "view", "distinctId": "ada"}


def read(
    path: Path, form: str = "", columns: Columns | None = None, **more: Any
) -> list[dict[str, Any] | str]:
    """The events of a file, without `insertId`; in place of one that is refused, why."""
    found: list[dict[str, Any] | str] = []
    with Records(path, form, columns or Columns(), **more) as file:
        for record in file:
            try:
                event = file.event(record, "id")
            except LineRefused as error:
                found.append(str(error))
                continue
            if event is not None:
                assert event.pop("insertId") == "id"
                found.append(event)
    return found


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# NDJSON


def test_fields_in_either_spelling_and_the_rest_as_properties(tmp_path: Path):
    lines = [
        {
            "event": "view",
            "distinct_id": "ada",
            "user_agent": "A",
            "previousId": "anon",
            "plan": "pro",
            "n": 1.5,
        },
        {
            **ADA,
            "time": "2026-11-01T10:00:00+01:00",
            "properties": {"list": [1, {"a": None}]},
            "properties.x": 1,
        },
        {**ADA, "time": 1793527200.25, "properties": "text"},
        {**ADA, "time": "1793527200000", "empty": "", "nothing": None},
    ]
    path = written(tmp_path / "a", "\n".join(map(json.dumps, lines)))
    assert read(path) == [
        {**ADA, "userAgent": "A", "previousId": "anon", "properties": {"plan": "pro", "n": 1.5}},
        {**ADA, "time": "2026-11-01T09:00:00+00:00", "properties": {"list": [1, {"a": None}], "x": 1}},
        {**ADA, "time": "2026-11-01T10:00:00.250000+00:00", "properties": {"properties": "text"}},
        {**ADA, "time": "2026-11-01T10:00:00+00:00"},
    ]


def test_keeps_the_insert_id_of_a_line(tmp_path: Path):
    with Records(written(tmp_path / "a.ndjson", json.dumps({**ADA, "insertId": 7})), "", Columns()) as file:
        (record,) = file
        assert file.event(record, "made up") == {**ADA, "insertId": "7"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "no JSON"),
        ('{"event": NaN}', "no JSON"),
        ("[" * 100_000, "no JSON"),
        (b'{"event": "\xff"}', "no JSON"),
        ("[1]", "no JSON object"),
        ("{}", "no event"),
        ('{"event": "", "distinctId": "a"}', "no event"),
        ('{"event": "a", "distinctId": null}', "no distinct_id"),
        ('{"event": {}, "distinctId": "a"}', "event must be a text"),
        ('{"event": true, "distinctId": "a"}', "event must be a text"),
        ('{"event": "a", "distinctId": "a", "time": "soon"}', "'soon' is no time"),
        ('{"event": "a", "distinctId": "a", "time": 1e300}', "is no time"),
        ('{"event": "a", "distinctId": "a", "time": [1]}', "is no time"),
        ("x" * (MAX_LINE_BYTES + 1), "longer than"),
    ],
)
def test_says_why_a_line_is_refused_and_goes_on(tmp_path: Path, line: str | bytes, why: str):
    content = line if isinstance(line, bytes) else line.encode()
    good = json.dumps(ADA).encode()
    path = written(tmp_path / "a", good + b"\n" + content + b"\n\n" + good)
    first, refusal, last = read(path, "ndjson")
    assert (first, last) == (ADA, ADA)
    assert why in refusal


def test_reads_long_lines_in_pieces(tmp_path: Path):
    long = b"x" * (3 * MAX_LINE_BYTES)
    path = written(tmp_path / "a", long + b"1\n" + long + b"2\n")
    with Records(path, "ndjson", Columns()) as file:
        one, two = list(file)
    assert one.content != two.content
    assert len(one.content) < 100


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_zipped_or_not_and_with_any_end_of_line(tmp_path: Path, zipped: bool, end: str):
    content = ("\ufeff" + json.dumps(ADA) + end + json.dumps(ADA)).encode()
    path = written(tmp_path / "a.jsonl", gzip.compress(content) if zipped else content)
    with Records(path, "", Columns()) as file:
        records = list(file)
        assert file.position() == path.stat().st_size
    assert [record.whole for record in records] == [True, False]
    assert {record.content for record in records} == {json.dumps(ADA).encode()}


@pytest.mark.parametrize("cut", [20, -9, -20])
def test_a_damaged_file_says_so(tmp_path: Path, cut: int):
    content = gzip.compress("\n".join(json.dumps({**ADA, "n": n}) for n in range(9999)).encode())
    path = written(tmp_path / "a.gz", content[:cut])
    with pytest.raises(FileRefused, match="cut off"):
        read(path, "ndjson")
    content = content[:2000] + b"\0" * 100 + content[2100:]
    with pytest.raises(FileRefused, match="damaged"):
        read(written(path, content), "ndjson")


# CSV


def test_reads_cells_as_what_they_look_like(tmp_path: Path):
    path = written(
        tmp_path / "a.csv",
        "event,distinct_id,n,f,b,zip,e,text,none\n"
        'buy,7,-3,1.50,true,01234,1e5,"two\nlines, ""quoted""",\n'
        "\n"
        "buy,8,9007199254740993,.5,false,0,-0,ä\n",
    )
    assert read(path) == [
        {
            "event": "buy",
            "distinctId": "7",
            "properties": {
                **{"n": -3, "f": 1.5, "b": True, "zip": "01234", "e": "1e5", "text": 'two\nlines, "quoted"'}
            },
        },
        {
            "event": "buy",
            "distinctId": "8",
            "properties": {**{"n": "9007199254740993", "f": ".5", "b": False, "zip": 0, "e": 0, "text": "ä"}},
        },
    ]
    assert read(path, columns=Columns(texts=frozenset({"zip"})))[1]["properties"]["zip"] == "0"  # type: ignore[index]


def test_maps_columns_and_sets_fields(tmp_path: Path):
    path = written(tmp_path / "a.tsv", "who\tevent\twhen\n1\t2\t2026-11-01 10:00\n")
    columns = Columns({"distinct_id": "who", "time": "when"}, {"event": "order"})
    assert read(path, columns=columns) == [
        {
            "event": "order",
            "distinctId": "1",
            "time": "2026-11-01T10:00:00+00:00",
            "properties": {"event": "2"},
        }
    ]
    path = written(tmp_path / "b.csv", ";event;distinct_id\n0;view;ada\n")
    assert read(path, delimiter=";") == [ADA]
    with pytest.raises(FileRefused, match="two columns are named event"):
        read(written(tmp_path / "c.csv", "event,event\na,b\n"))


def test_says_why_a_row_is_refused_and_goes_on(tmp_path: Path):
    path = written(tmp_path / "a.csv", 'event,distinct_id\nview,ada\na,b,c\n"x"y,z\nview,ada\n"open')
    first, too_many, quote, second, cut = read(path)
    assert (first, second) == (ADA, ADA)
    assert "3 cells" in too_many
    assert "expected after" in quote
    assert "end of data" in cut


@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")),
            min_size=2,
            max_size=2,
        )
    )
)
def test_reads_what_csv_writes(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["a", "b"], *rows])
    path = written(tmp_path_factory.mktemp("csv") / "a.csv", text.getvalue())
    columns = Columns(fixed={"event": "view", "distinct_id": "ada"}, texts=frozenset("ab"))
    properties = [{name: cell for name, cell in zip("ab", row, strict=True) if cell} for row in rows]
    expected = [{**ADA, "properties": each} if each else ADA for each in properties]
    assert read(path, columns=columns) == expected


# Parquet


def test_reads_every_type_of_parquet(tmp_path: Path):
    when = datetime(2026, 11, 1, 10, tzinfo=UTC)
    columns = {
        "event": ["view", "view"],
        "distinct_id": [1, 2],
        "time": [when, when],
        "int": [2**60, 5],
        "float": [float("nan"), 0.5],
        "decimal": [Decimal("19.90"), None],
        "date": [when.date(), None],
        "bytes": [b"a\xff", None],
        "list": [[1, None], []],
        "struct": [{"a": {"b": when}}, None],
        "none": [None, None],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first == {
        "event": "view",
        "distinctId": "1",
        "time": when.isoformat(),
        "properties": {
            "int": str(2**60),
            "decimal": 19.9,
            "date": "2026-11-01",
            "bytes": "a\ufffd",
            "list": [1, None],
            "struct": {"a": {"b": when.isoformat()}},
        },
    }
    assert second == {
        "event": "view",
        "distinctId": "2",
        "time": when.isoformat(),
        "properties": {"int": 5, "float": 0.5, "list": []},
    }


def test_rows_of_other_files_are_other_records(tmp_path: Path):
    contents = []
    for name, value in (("a", 1), ("b", 2), ("a again", 1)):
        parquet.write_table(pyarrow.table({"event": ["view"] * 3, "x": [7, 7, value]}), tmp_path / name)
        with Records(tmp_path / name, "", Columns()) as file:
            contents.append([record.content for record in file])
    assert contents[0] == contents[2]
    assert len({*contents[0], *contents[1]}) == 6


def test_what_is_no_parquet_is_refused(tmp_path: Path):
    with pytest.raises(FileRefused, match="no Parquet"):
        read(written(tmp_path / "a.parquet", "PAR"))
    with pytest.raises(FileRefused, match="no whole Parquet"):
        read(written(tmp_path / "a.parquet", b"PAR1" + b"\0" * 100))


# Which form


@pytest.mark.parametrize(
    ("content", "form"),
    [
        ('{"event":"a","distinct_id":"b","status":200,"time":1,"remote_addr":"c"}', "ndjson"),
        ('{"status":200,"ts":1,"remote_ip":"c"}', "json-log"),
        ('{"anything":1}', "ndjson"),
        ('\n\n1.2.3.4 - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 1 "-" "-"', "combined"),
        ("", "ndjson"),
    ],
)
def test_tells_the_form_by_the_first_line(tmp_path: Path, content: str, form: str):
    with Records(written(tmp_path / "a.log", content), "", Columns()) as file:
        assert file.form == form
        assert len(list(file)) == len(content.splitlines())


def test_what_it_cannot_tell_it_asks_for(tmp_path: Path):
    with pytest.raises(FileRefused, match="--format"):
        read(written(tmp_path / "passwd", "root:x:0:0:root:/root:/bin/bash\n" * 100))
    with pytest.raises(FileRefused, match="cannot be opened"):
        read(tmp_path / "absent")
