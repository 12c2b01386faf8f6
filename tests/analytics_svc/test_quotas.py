"""Quotas: never exceeded by any number of processes, told with a way out, and counted by days."""

import asyncio
from datetime import UTC, date, datetime, timedelta

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from meshboard.analytics.v1.source_pb2 import Source
from meshboard.analytics.v1.source_service_pb2 import ListSourceUsageRequest, UpdateSourceRequest

from services.analytics_svc.models import SourceUsage
from services.analytics_svc.quotas import Quotas
from services.chassis import errors
from services.chassis.bus import BusError
from tests.analytics_svc.conftest import Analytics
from tests.harness import Member, reason_of, refused, status_of

EXHAUSTED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXHAUSTED")


async def limited(analytics: Analytics, **limits: int) -> tuple[Member, Source, str]:
    """A source with quotas."""
    member = analytics.identity.member("editor")
    source, secret = await analytics.source(member)
    wanted = Source(source_id=source.source_id)
    for name, limit in limits.items():
        setattr(wanted, name, limit)
    changed = await analytics.sources.UpdateSource(
        UpdateSourceRequest(source=wanted), metadata=member.metadata
    )
    return member, changed.source, secret


async def usage(
    analytics: Analytics, member: Member, source: Source, **page: object
) -> list[tuple[str, int]]:
    request = ListSourceUsageRequest(source_id=source.source_id, **page)  # type: ignore[arg-type]
    answer = await analytics.sources.ListSourceUsage(request, metadata=member.metadata)
    return [(day.date, day.event_count) for day in answer.days]


async def until_full(quotas: Quotas, source: Source, batch: int) -> int:
    """Takes batches until one is refused; gives how many events were taken."""
    taken = 0
    while True:
        try:
            await quotas.take(source, batch)
        except errors.Error as error:
            if error.reason != "QUOTA_EXHAUSTED":
                raise
            return taken
        taken += batch


async def test_refuses_what_does_not_fit_in_and_says_until_when(analytics: Analytics) -> None:
    member, source, secret = await limited(analytics, events_per_day=10)
    await analytics.send(secret, [{}] * 8)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await analytics.send(secret, [{}] * 3)
    assert (caught.value.code(), reason_of(caught.value)) == EXHAUSTED
    info, retry = ErrorInfo(), RetryInfo()
    details = status_of(caught.value).details
    assert any(detail.Unpack(info) for detail in details)
    assert any(detail.Unpack(retry) for detail in details)
    assert dict(info.metadata) == {"limit": "10", "period": "day"}
    midnight = (datetime.now(UTC) + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    left = (midnight - datetime.now(UTC)).total_seconds()
    assert left - 1 <= retry.retry_delay.seconds < left + 60
    await analytics.send(secret, [{}] * 2)  # a smaller one fits in
    assert await refused(analytics.send(secret, [{}])) == EXHAUSTED
    await analytics.quotas.settle()
    assert await usage(analytics, member, source) == [(datetime.now(UTC).date().isoformat(), 10)]
    await analytics.until_count(member, source, 10)


async def test_counts_only_what_is_accepted(analytics: Analytics) -> None:
    member, source, secret = await limited(analytics, events_per_day=10)
    answer = await analytics.send(secret, [{}, {"event": ""}, {"distinctId": ""}])
    assert answer.accepted_count == 1
    await analytics.quotas.settle()
    assert [count for _, count in await usage(analytics, member, source)] == [1]


async def test_a_higher_quota_holds_at_once(analytics: Analytics) -> None:
    member, source, secret = await limited(analytics, events_per_day=1)
    await analytics.send(secret, [{}])
    assert await refused(analytics.send(secret, [{}])) == EXHAUSTED
    wanted = Source(source_id=source.source_id, events_per_day=2)
    await analytics.sources.UpdateSource(UpdateSourceRequest(source=wanted), metadata=member.metadata)
    await analytics.send(secret, [{}])
    assert await refused(analytics.send(secret, [{}])) == EXHAUSTED


async def test_what_came_before_the_quota_counts(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, secret = await analytics.source(member)
    await analytics.send(secret, [{}] * 7)  # Postgres does not know of them yet
    wanted = Source(source_id=source.source_id, events_per_day=10)
    await analytics.sources.UpdateSource(UpdateSourceRequest(source=wanted), metadata=member.metadata)
    assert await refused(analytics.send(secret, [{}] * 4)) == EXHAUSTED
    await analytics.send(secret, [{}] * 3)


async def test_processes_together_never_exceed_it(analytics: Analytics) -> None:
    _, source, _ = await limited(analytics, events_per_day=5_000)
    processes = [Quotas(analytics.db, lambda: datetime.now(UTC)) for _ in range(4)]
    taken = sum(
        await asyncio.gather(*(until_full(quotas, source, batch) for quotas in processes for batch in (1, 7)))
    )
    # Room for a last batch of 7, and what the others have set aside.
    assert 5_000 - 7 - 3 * 50 <= taken <= 5_000
    for quotas in processes:
        await quotas.settle()
    fresh = Quotas(analytics.db, lambda: datetime.now(UTC))
    assert taken + await until_full(fresh, source, 1) == 5_000


async def test_a_killed_process_costs_a_hundredth(analytics: Analytics) -> None:
    _, source, _ = await limited(analytics, events_per_day=1_000)
    await Quotas(analytics.db, lambda: datetime.now(UTC)).take(source, 1)
    fresh = Quotas(analytics.db, lambda: datetime.now(UTC))
    assert await until_full(fresh, source, 1) == 1_000 - 10


async def test_days_and_months_begin_anew(analytics: Analytics) -> None:
    member, source, _ = await limited(analytics, events_per_day=6, events_per_month=10)
    clock = datetime(2026, 1, 30, 23, 0, tzinfo=UTC)
    quotas = Quotas(analytics.db, lambda: clock)

    async def take(count: int) -> errors.Error | None:
        try:
            await quotas.take(source, count)
        except errors.Error as error:
            return error
        finally:
            await quotas.settle()
        return None

    assert await take(6) is None
    refusal = await take(1)
    assert refusal is not None
    assert (refusal.metadata["period"], refusal.retry_seconds) == ("day", 3600)
    clock = datetime(2026, 1, 31, 23, 0, tzinfo=UTC)
    assert await take(4) is None
    refusal = await take(1)
    assert refusal is not None
    assert (refusal.metadata, refusal.retry_seconds) == ({"limit": "10", "period": "month"}, 3600)
    clock = datetime(2026, 2, 1, tzinfo=UTC)
    assert await take(6) is None
    refusal = await take(1)
    assert refusal is not None
    assert refusal.retry_seconds == 86_400
    assert await usage(analytics, member, source) == [("2026-02-01", 6), ("2026-01-31", 4), ("2026-01-30", 6)]


async def test_a_month_is_long_to_wait_for(analytics: Analytics) -> None:
    _, source, _ = await limited(analytics, events_per_month=1)
    quotas = Quotas(analytics.db, lambda: datetime(2026, 12, 1, tzinfo=UTC))
    await quotas.take(source, 1)
    with pytest.raises(errors.Error) as caught:
        await quotas.take(source, 1)
    assert caught.value.retry_seconds == 31 * 86_400


async def test_what_is_not_logged_is_given_back(
    analytics: Analytics, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, secret = await limited(analytics, events_per_day=1)

    async def fail(*_: object) -> None:
        raise BusError("away")

    with monkeypatch.context() as patch:
        patch.setattr(analytics.ingester.log, "append", fail)
        outcome = await refused(analytics.send(secret, [{}]))
        assert outcome == (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
    await analytics.send(secret, [{}])


async def test_usage_has_pages(analytics: Analytics) -> None:
    member = analytics.identity.member("viewer")
    editor = analytics.identity.member("editor", member.workspace_id)
    source, _ = await analytics.source(editor)
    async with analytics.db.begin() as session:
        for day in range(1, 6):
            session.add(
                SourceUsage(
                    workspace_id=source.workspace_id,
                    source_id=source.source_id,
                    day=date(2026, 3, day),
                    event_count=day - 1,  # on the first there were none
                )
            )
    request = ListSourceUsageRequest(source_id=source.source_id, page_size=3)
    page = await analytics.sources.ListSourceUsage(request, metadata=member.metadata)
    rest = await usage(analytics, member, source, page_size=3, page_token=page.next_page_token)
    assert [day.event_count for day in page.days] + [count for _, count in rest] == [4, 3, 2, 1]
