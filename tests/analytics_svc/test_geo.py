"""Places of addresses: from a file in MaxMind's format, looked up in ingest and never kept."""

import os
from pathlib import Path
from typing import Any

import maxminddb
import netaddr
import pytest
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest
from mmdb_writer import MMDBWriter

from services.analytics_svc import geo
from services.analytics_svc.event_log import STREAM
from services.analytics_svc.geo import GeoDatabase
from services.analytics_svc.write_keys import HEADER
from services.chassis.origins import ADDRESS_HEADER
from tests.analytics_svc.conftest import Analytics

BERLIN = {
    "country": {"iso_code": "DE", "names": {"en": "Germany"}},
    "subdivisions": [{"names": {"de": "Land Berlin", "en": "State of Berlin"}}],
    "city": {"names": {"en": "Berlin"}},
}
PARIS = {"country": {"iso_code": "FR"}, "city": {"names": {"fr": "Paris"}}}
PLAIN = {"country": "US", "region": "Ohio", "city": "Dayton"}
NAMED = {"country": "Germany", "country_code": "DE", "region": "Berlin", "city": "Berlin"}


def write(path: Path, networks: dict[str, Any]) -> None:
    """Writes a database, and puts it into its place at once."""
    writer = MMDBWriter(ip_version=6, ipv4_compatible=True, database_type="City")
    for network, record in networks.items():
        writer.insert_network(netaddr.IPSet([network]), record)
    writer.to_db_file(str(path.with_suffix(".new")))
    os.replace(path.with_suffix(".new"), path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "city.mmdb"
    write(
        path,
        {
            "203.0.113.0/24": BERLIN,
            "2001:db8::/32": PARIS,
            "198.51.100.0/25": PLAIN,
            "198.51.100.128/25": NAMED,
            "192.0.2.0/24": {"country": 5, "city": ["x"], "subdivisions": {}},
        },
    )
    return path


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("203.0.113.9", ("DE", "State of Berlin", "Berlin")),
        ("::ffff:203.0.113.9", ("DE", "State of Berlin", "Berlin")),
        ("2001:db8::1", ("FR", "", "Paris")),
        ("198.51.100.1", ("US", "Ohio", "Dayton")),
        ("198.51.100.200", ("DE", "Berlin", "Berlin")),
        ("192.0.2.1", ("", "", "")),
        ("10.0.0.1", ("", "", "")),
        ("no address", ("", "", "")),
        ("", ("", "", "")),
        ("203.0.113.9:80", ("", "", "")),
    ],
)
def test_finds_places(path: Path, address: str, place: tuple[str, str, str]) -> None:
    found = LoggedEvent.FromString(GeoDatabase(path).place_of(address))
    assert (found.country, found.region, found.city) == place


def test_reads_a_file_that_takes_the_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = GeoDatabase(path)
    assert b"Berlin" in database.place_of("203.0.113.9")
    monkeypatch.setattr(geo, "CHECK_SECONDS", 0.0)
    database = GeoDatabase(path)
    write(path, {"203.0.113.0/24": PLAIN})
    assert b"Dayton" in database.place_of("203.0.113.9")
    path.with_suffix(".new").write_bytes(b"no database")
    os.replace(path.with_suffix(".new"), path)
    assert b"Dayton" in database.place_of("203.0.113.9")  # the one that can be read
    path.unlink()
    assert b"Dayton" in database.place_of("203.0.113.9")


def test_does_not_start_with_what_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "city.mmdb"
    path.write_bytes(b"no database")
    with pytest.raises(maxminddb.InvalidDatabaseError):
        GeoDatabase(path)


async def test_events_have_a_place_and_no_address(
    analytics: Analytics, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analytics.ingester, "geo", GeoDatabase(path))
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    request = IngestRequest()
    for number, address in enumerate(("", "2001:db8::77", "198.51.100.77", "unknown")):
        request.events.append(Event(event="view", distinct_id=str(number), ip=address))
    await analytics.ingest.Ingest(request, metadata=((HEADER, key), (ADDRESS_HEADER, "203.0.113.77")))
    logged = await analytics.bus.last(STREAM, f"events.{source.workspace_id}.{source.source_id}")
    assert logged is not None
    assert len(LoggedBatch.FromString(logged.payload).events) == 4
    for text in (b"203.0.113", b"2001:db8", b"198.51.100"):
        assert text not in logged.payload
    await analytics.until_count(member, source, 4)
    places = [{"property": name} for name in ("distinct_id", "country", "region", "city")]
    result = await analytics.ask(member, source, breakdowns=places, orderBy=[{"column": "distinct_id"}])
    assert [row[:4] for row in result["rows"]] == [
        ["0", "DE", "State of Berlin", "Berlin"],
        ["1", "FR", "", "Paris"],
        ["2", "US", "Ohio", "Dayton"],
        ["3", "", "", ""],
    ]


async def test_without_a_database_nothing_has_a_place(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    request = IngestRequest(events=[Event(event="view", distinct_id="ada", ip="203.0.113.77")])
    await analytics.ingest.Ingest(request, metadata=((HEADER, key), (ADDRESS_HEADER, "203.0.113.77")))
    await analytics.until_count(member, source, 1)
    result = await analytics.ask(member, source, breakdowns=[{"property": "country"}, {"property": "city"}])
    assert result["rows"] == [["", "", 1.0]]
