"""What dashboards show, at the gateway of the whole mesh."""

from __future__ import annotations

import pytest

from tests.mesh.people import Person

pytestmark = pytest.mark.xdist_group("mesh")


async def test_viewers_say_what_time_they_look_at(ann: Person):
    source = (await ann.post("/v1/sources", {"title": "Shop"}))["source"]["sourceId"]
    dashboard = (await ann.post("/v1/dashboards", {"title": "Sales"}))["dashboard"]["dashboardId"]
    path = f"/v1/dashboards/{dashboard}"
    query = {
        "sourceIds": [source],
        "granularity": "MINUTE",
        "fillGaps": True,
        "timeRange": {"lastSeconds": 120},
    }
    await ann.post(f"{path}/widgets", {"kind": "TIMESERIES", "query": query})
    await ann.post(f"{path}/widgets", {"kind": "NUMBER", "query": {"sourceIds": [source]}})

    async def rows(arguments: str) -> list[int]:
        data = await ann.get(f"{path}:data{arguments}")
        return [len(widget["result"]["rows"]) for widget in data["widgets"]]

    assert (await rows(""))[0] <= 3
    # 60 where it is asked at the beginning of a minute; else also the part of one at either end.
    assert 60 <= (await rows("?timeRange.lastSeconds=3600"))[0] <= 62
    fixed = "timeRange.startTime=2026-01-01T00:00:00Z&timeRange.endTime=2026-01-01T00:05:00Z"
    assert await rows(f"?{fixed}") == await rows(f"?{fixed}") == [5, 1]
    assert (await ann.call("GET", f"{path}:data?choices=country=de")).reason == "CHOICE_INVALID"
    assert (await ann.call("GET", f"{path}/variables/country/values")).reason == "VARIABLE_NOT_FOUND"


async def test_marks_stand_on_the_axes_of_time(ann: Person):
    dashboard = (await ann.post("/v1/dashboards", {"title": "Sales"}))["dashboard"]["dashboardId"]
    path = f"/v1/dashboards/{dashboard}/annotations"
    new = {"time": "2026-01-05T00:00:00Z", "text": "Release 7", "tags": ["deploy"]}
    made = (await ann.post(path, new))["annotation"]
    assert (made["origin"], made["text"], made["etag"]) == ("BY_HAND", "Release 7", "1")
    one = f"{path}/{made['annotationId']}"
    changed = await ann.call("PATCH", f"{one}?updateMask=text", {"text": "Release 8"})
    assert changed.status == 200
    found = await ann.get(f"{path}?timeRange.startTime=2026-01-01T00:00:00Z&tag=deploy")
    assert [mark["text"] for mark in found["annotations"]] == ["Release 8"]
    assert (await ann.call("DELETE", one)).status == 200
    assert (await ann.get(path))["annotations"] == []
