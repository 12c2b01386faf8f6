from collections import Counter

import pytest

from cli.access_log import LineRefused, event_of
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
