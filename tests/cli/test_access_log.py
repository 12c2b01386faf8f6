from collections import Counter
from typing import Any

import pytest

from cli.access_log import LineRefused, event_of, event_of_json
from cli.demo import LOG, read_log

GOOD = (
    '1.2.3.4 - ann [17/May/2015:10:05:03 +0200] "GET /a?b=c HTTP/1.1" 200 17 "http://x.org/" "Agent \\"7\\""'
)


def test_reads_every_piece():
    assert event_of(GOOD, "id") == {
        "event": "request",
        "distinctId": "1.2.3.4",
        "ip": "1.2.3.4",
        "insertId": "id",
        "time": "2015-05-17T08:05:03+00:00",
        "url": "/a?b=c",
        "referrer": "http://x.org/",
        "userAgent": 'Agent \\"7\\"',
        "properties": {"method": "GET", "protocol": "HTTP/1.1", "status": 200, "bytes": 17, "user": "ann"},
    }


@pytest.mark.parametrize(
    ("line", "piece"),
    [
        ("", "address"),
        (GOOD.replace("[", ""), "time"),
        (GOOD.replace("10:05", "25:05"), "time"),
        (GOOD[:-1], "user agent"),
        (GOOD.replace(" 200 ", " OK "), "status"),
        (GOOD + " more", "more"),
    ],
)
def test_says_what_is_wrong(line: str, piece: str):
    with pytest.raises(LineRefused, match=piece):
        event_of(line, "id")


def test_reads_the_whole_example():
    events, refused = [], []
    for number, line in read_log(LOG):
        try:
            events.append(event_of(line, f"{LOG.name}:{number}"))
        except LineRefused as error:
            refused.append((number, str(error)))
    assert refused == [(8899, '"user agent" is missing or not terminated')]
    assert len(events) == len({e["insertId"] for e in events}) == 9999
    assert len({e["distinctId"] for e in events}) == 1753
    statuses = Counter(e["properties"]["status"] for e in events)
    assert (statuses[404], statuses[500]) == (213, 3)
    (busiest, count), *_ = Counter(e["time"][:13] for e in events).most_common(1)
    assert (busiest, count) == ("2015-05-19T19", 136)


SEEN = {
    "event": "request",
    "distinctId": "1.2.3.4",
    "ip": "1.2.3.4",
    "insertId": "id",
    "time": "2026-11-01T10:00:00.250000+00:00",
    "url": "https://shop.example/a?b=c",
    "referrer": "http://x.org/",
    "userAgent": "Agent",
    "properties": {
        "method": "GET",
        "protocol": "HTTP/1.1",
        "user": "ann",
        "status": 404,
        "bytes": 17,
        "duration": 0.25,
    },
}
# Lines as these servers write them, shortened to what is read and a little more.
NGINX = {
    "msec": "1793527200.250",
    "remote_addr": "1.2.3.4",
    "remote_user": "ann",
    "scheme": "https",
    "http_host": "shop.example",
    "request": "GET /a?b=c HTTP/1.1",
    "status": "404",
    "body_bytes_sent": "17",
    "request_time": "0.250",
    "http_referer": "http://x.org/",
    "http_user_agent": "Agent",
}
CADDY = {
    "level": "info",
    "ts": 1793527200.25,
    "logger": "http.log.access",
    "request": {
        "remote_ip": "5.6.7.8",
        "client_ip": "1.2.3.4",
        "proto": "HTTP/1.1",
        "method": "GET",
        "host": "shop.example",
        "uri": "/a?b=c",
        "headers": {"User-Agent": ["Agent"], "Referer": ["http://x.org/"]},
    },
    "user_id": "ann",
    "duration": 0.25,
    "size": 17,
    "status": 404,
    "scheme": "https",
}
TRAEFIK = {
    "ClientHost": "1.2.3.4",
    "ClientUsername": "ann",
    "DownstreamContentSize": 17,
    "DownstreamStatus": 404,
    "Duration": 250000000,
    "RequestHost": "shop.example",
    "RequestMethod": "GET",
    "RequestPath": "/a?b=c",
    "RequestProtocol": "HTTP/1.1",
    "StartUTC": "2026-11-01T10:00:00.250000123Z",
    "request_Referer": "http://x.org/",
    "request_User-Agent": "Agent",
    "scheme": "https",
}
ENVOY = {
    "start_time": "2026-11-01T10:00:00.250Z",
    "method": "GET",
    "path": "/a?b=c",
    "protocol": "HTTP/1.1",
    "response_code": 404,
    "bytes_sent": 17,
    "duration": 250,
    "user_agent": "Agent",
    "referer": "http://x.org/",
    "authority": "shop.example",
    "downstream_remote_address": "1.2.3.4:5678",
    "remote_user": "ann",
    "scheme": "https",
}


@pytest.mark.parametrize("line", [NGINX, CADDY, TRAEFIK, ENVOY], ids=["nginx", "Caddy", "Traefik", "Envoy"])
def test_reads_json_of_known_servers(line: dict[str, Any]):
    assert event_of_json(line, "id") == SEEN


def test_reads_what_there_is():
    line = {"remote_addr": "a.example", "time_local": "01/Nov/2026:10:00:00 +0100", "status": 200}
    assert event_of_json(line, "id") == {
        "event": "request",
        "distinctId": "a.example",
        "insertId": "id",
        "time": "2026-11-01T09:00:00+00:00",
        "url": "",
        "referrer": "",
        "userAgent": "",
        "properties": {"status": 200},
    }
    ipv6 = {**line, "remote_addr": "[2001:db8::1]:443"}
    assert event_of_json(ipv6, "id")["ip"] == "2001:db8::1"
    assert event_of_json({**line, "remote_addr": "2001:db8::1"}, "id")["ip"] == "2001:db8::1"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"remote_addr": "-"}, "address"),
        ({"msec": None}, "time"),
        ({"status": ""}, "status"),
        ({"status": "OK"}, "the status 'OK' is no number"),
        ({"body_bytes_sent": [{}]}, None),
        ({"msec": "soon"}, "'soon' is no time"),
        ({"request_time": "fast"}, "request_time 'fast' is no number"),
        ({"status": "nan"}, "no number"),
    ],
)
def test_says_what_a_json_line_lacks(change: dict[str, Any], why: str | None):
    if why is None:
        assert "bytes" not in event_of_json({**NGINX, **change}, "id")["properties"]
        return
    with pytest.raises(LineRefused, match=why):
        event_of_json({**NGINX, **change}, "id")
