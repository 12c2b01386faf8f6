"""Files of events, read record by record: NDJSON, CSV, Parquet, and access logs; gzipped or not.

A record is a line, in CSV a row that may take several, in Parquet a row. Reading a record costs little; what it says is
worked out when it is asked for, so that records which were sent earlier are passed over quickly.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import orjson

from cli.access_log import LineRefused, event_of, event_of_json, time_of

FORMATS = ("ndjson", "csv", "parquet", "combined", "json-log")
MAX_LINE_BYTES = 1 << 20
_ROWS = 1000
# Larger integers are no exact numbers in JSON: they are kept as text.
_EXACT = 1 << 53
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"

# The fields of an event by the names that columns have, in the contract's spelling and in JSON's.
_FIELDS = {
    "event": "event",
    "distinct_id": "distinctId",
    "insert_id": "insertId",
    "time": "time",
    "url": "url",
    "referrer": "referrer",
    "user_agent": "userAgent",
    "previous_id": "previousId",
    "ip": "ip",
}
_FIELD_OF_NAME = {**_FIELDS, **{json: json for json in _FIELDS.values()}}
FIELD_NAMES = tuple(_FIELDS)
_OWN = "properties."


class FileRefused(Exception):
    """The file cannot be read as what it is said to be; the message says why."""


class Record(NamedTuple):
    """One record. `content` is what it is recognised by; `whole` says that it cannot grow any more."""

    line: int
    content: bytes
    value: Any
    whole: bool = True


class Columns:
    """Which columns, or names in JSON, are which fields of an event.

    `named` has columns by field, `fixed` values by field, both in the contract's spelling; columns in `texts` stay text
    where they look like numbers. A column with the name of a field is that field; all others are properties.
    """

    def __init__(
        self,
        named: Mapping[str, str] | None = None,
        fixed: Mapping[str, str] | None = None,
        texts: frozenset[str] = frozenset(),
    ) -> None:
        self._fixed = {_FIELDS[name]: value for name, value in (fixed or {}).items()}
        fields = {column: _FIELDS[name] for name, column in (named or {}).items()}
        taken = {*fields.values(), *self._fixed}
        self._fields = {name: json for name, json in _FIELD_OF_NAME.items() if json not in taken} | fields
        self.texts = texts

    def event_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The event that a row tells of. Raises LineRefused."""
        event: dict[str, Any] = {}
        properties: dict[str, Any] = {}
        for column, value in row.items():
            if value is None or value == "":
                continue
            if name := self._fields.get(column):
                event[name] = value
            elif column == "properties" and isinstance(value, dict):
                properties |= value
            else:
                properties[column.removeprefix(_OWN)] = value
        event |= self._fixed
        for name, value in event.items():
            event[name] = time_of(value) if name == "time" else _text(value, name)
        for name in ("event", "distinct_id"):
            if not event.get(_FIELDS[name]):
                raise LineRefused(
                    f"it has no {name}: say where it is with --map {name}=COLUMN, or what with --set"
                )
        if properties:
            event["properties"] = properties
        return event


class Records:
    """The records of one file, from the first, inside `with`. Raises FileRefused."""

    def __init__(self, path: Path, form: str, columns: Columns, *, delimiter: str = "") -> None:
        try:
            self._file = path.open("rb")
            self.size = path.stat().st_size
        except OSError as error:
            raise FileRefused(f"{path} cannot be opened: {error.strerror}") from error
        try:
            start = self._file.read(4)
            self._file.seek(0)
            self.form = form or _form_of_name(path)
            if start == _PARQUET and self.form in {"", "parquet"}:
                self.form = "parquet"
                self._records, self._position = _parquet(self._file, self.size)
            else:
                zipped = start.startswith(_GZIP)
                text = cast(io.BufferedReader, gzip.GzipFile(fileobj=self._file)) if zipped else self._file
                lines = _lines(text)
                if not self.form:
                    self.form, lines = _form_of_content(path, lines)
                if self.form == "csv":
                    tabs = ".tsv" in path.suffixes
                    lines = _rows(lines, delimiter or ("\t" if tabs else ","))
                elif self.form == "parquet":
                    raise FileRefused(f"{path} is no Parquet file")
                self._records, self._position = lines, self._file.tell
        except BaseException:
            self._file.close()
            raise
        self._event: Callable[[Any, str], dict[str, Any]] = {
            "ndjson": lambda value, _: columns.event_of(_object(value)),
            "csv": lambda value, _: columns.event_of(_cells(value, columns.texts)),
            "parquet": lambda value, _: columns.event_of(_values(value, columns.texts)),
            "combined": lambda value, insert_id: event_of(value.decode(errors="replace"), insert_id),
            "json-log": lambda value, insert_id: event_of_json(_object(value), insert_id),
        }[self.form]

    def __iter__(self) -> Iterator[Record]:
        """The records. Raises FileRefused where the file is damaged; what was before is good."""
        try:
            yield from self._records
        except (
            EOFError,
            OSError,
            ValueError,
            zlib.error,
        ) as error:  # those of gzip and pyarrow are among them
            raise FileRefused(f"{self._file.name} is damaged, or was cut off: {error}") from error

    def event(self, record: Record, insert_id: str) -> dict[str, Any] | None:
        """The event, in JSON form, that a record tells of; None for a blank one. Raises LineRefused.

        It has `insert_id`, unless the record names one.
        """
        if isinstance(record.value, LineRefused):
            raise record.value
        if not record.value or (isinstance(record.value, bytes) and not record.value.strip()):
            return None
        event = self._event(record.value, insert_id)
        event.setdefault("insertId", insert_id)
        return event

    def position(self) -> int:
        """How many bytes of the file have been read."""
        return self._position()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


# Reading


def _lines(file: io.BufferedReader) -> Iterator[Record]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        content, value = line, cast(Any, line.rstrip(b"\r\n"))
        if len(line) > MAX_LINE_BYTES:
            digest = hashlib.sha256(line)
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
                digest.update(line)
            content, value = digest.digest(), LineRefused(f"it is longer than {MAX_LINE_BYTES:,} bytes")
        yield Record(number, content.rstrip(b"\r\n"), value, line.endswith(b"\n"))


def _rows(lines: Iterator[Record], delimiter: str) -> Iterator[Record]:
    """Rows of CSV (RFC 4180), as (header, cells); the header is a record that says nothing."""
    taken: list[Record] = []

    def feed() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            if isinstance(line.value, LineRefused):
                raise csv.Error(str(line.value))
            yield line.value.decode(errors="replace") + "\n"

    csv.field_size_limit(MAX_LINE_BYTES)
    header: list[str] = []
    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        value: Any
        try:
            row = next(reader)
            value = (header, row) if header and row else None
            header = header or _checked(row)
        except StopIteration:
            return
        except csv.Error as error:
            value = LineRefused(str(error))
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        content = b"\n".join(line.content for line in taken)
        yield Record(taken[0].line, content, value, taken[-1].whole)


def _checked(header: list[str]) -> list[str]:
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise FileRefused(f"two columns are named {twice[0]}")
    return header


def _parquet(file: io.BufferedReader, size: int) -> tuple[Iterator[Record], Callable[[], int]]:
    try:
        from pyarrow import parquet  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        raise FileRefused("Parquet needs pyarrow: install meshboard[parquet]") from None
    # The whole file is what its rows are recognised by.
    digest = hashlib.file_digest(file, "sha256").digest()
    file.seek(0)
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise FileRefused(f"{file.name} is no whole Parquet file: {error}") from error
    count = max(table.metadata.num_rows, 1)
    read = 0

    def rows() -> Iterator[Record]:
        nonlocal read
        for batch in table.iter_batches(batch_size=_ROWS):
            # Only what is not passed over is turned into values.
            values = cache(batch.to_pylist)
            for index in range(batch.num_rows):
                read += 1
                yield Record(read, b"%b %d" % (digest, read), (values, index))

    return rows(), lambda: size * read // count


# What a record says


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LineRefused(f"it is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise LineRefused("it is no JSON object")
    return value


def _object_with_event(line: bytes) -> dict[str, Any]:
    found = _object(line)
    if "event" not in found or not found.keys() & {"distinct_id", "distinctId"}:
        raise LineRefused("it is no event")
    return found


def _cells(row: tuple[Sequence[str], Sequence[str]], texts: frozenset[str]) -> dict[str, Any]:
    header, cells = row
    if len(cells) > len(header):
        raise LineRefused(f"it has {len(cells)} cells, and the header has {len(header)}")
    return {
        column: cell if column in texts or column in _FIELD_OF_NAME else _guess(cell)
        for column, cell in zip(header, cells, strict=False)
        if column  # tables that were written with their index have a column without a name
    }


def _guess(cell: str) -> Any:
    """A number or a boolean where the cell is written as one; `007` and `1e5` are texts."""
    if cell in {"true", "false"}:
        return cell == "true"
    digits = cell.removeprefix("-")
    whole, _, fraction = digits.partition(".")
    if not (whole.isascii() and whole.isdigit()) or (whole != "0" and whole.startswith("0")):
        return cell
    if "." in digits:
        return float(cell) if fraction.isascii() and fraction.isdigit() else cell
    return int(cell) if int(whole) < _EXACT else cell


def _values(row: tuple[Callable[[], list[dict[str, Any]]], int], texts: frozenset[str]) -> dict[str, Any]:
    rows, index = row
    return {
        name: str(value) if name in texts else _plain(value)
        for name, value in rows()[index].items()
        if value is not None
    }


def _plain(value: Any) -> Any:
    """A value of Parquet as JSON has it; what is no value is None."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < _EXACT else str(value)
    if isinstance(value, float | Decimal):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, datetime):
        return time_of(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LineRefused(f"{name} must be a text")
    return str(int(value)) if float(value).is_integer() else str(value)


# Which format it is


def _form_of_name(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "", ".ndjson": ""}.get(
        suffixes[-1] if suffixes else "", ""
    )


def _form_of_content(path: Path, lines: Iterator[Record]) -> tuple[str, Iterator[Record]]:
    """Tells the format by the first line that says something."""
    looked_at: list[Record] = []

    def again() -> Iterator[Record]:
        yield from looked_at
        yield from lines

    for record in lines:
        looked_at.append(record)
        if isinstance(record.value, LineRefused) or not record.value.strip():
            continue
        for form, read in (
            ("ndjson", _object_with_event),
            ("json-log", lambda line: event_of_json(_object(line), "")),
            ("ndjson", _object),
            ("combined", lambda line: event_of(line.decode(errors="replace"), "")),
        ):
            try:
                read(record.value)
            except LineRefused:
                continue
            return form, again()
        if len(looked_at) >= 10:
            break
    if not looked_at:
        return "ndjson", again()
    raise FileRefused(f"neither the name nor the first lines of {path} tell the format: say it with --format")
