"""Answers questions about what actors do one after the other: run and remembered as all queries are."""

from typing import Any

import grpc.aio
from meshboard.analytics.v1.insight_service_pb2 import (
    RunFunnelRequest,
    RunFunnelResponse,
    RunLifecycleRequest,
    RunLifecycleResponse,
    RunPathsRequest,
    RunPathsResponse,
    RunRetentionRequest,
    RunRetentionResponse,
)
from meshboard.analytics.v1.insight_service_pb2_grpc import InsightServiceServicer

from services.analytics_svc.funnels import compile_funnel, read_funnel
from services.analytics_svc.lifecycle import compile_lifecycle, read_lifecycle
from services.analytics_svc.memberships import check_visible
from services.analytics_svc.paths import compile_paths, read_paths
from services.analytics_svc.queries import Queries
from services.analytics_svc.retention import compile_retention, read_retention
from services.chassis import auth

Context = grpc.aio.ServicerContext[Any, Any]


class InsightServicer(InsightServiceServicer):
    """The access stage has checked `sources.query` on each source."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries

    async def RunFunnel(self, request: RunFunnelRequest, context: Context) -> RunFunnelResponse:
        query, workspace_id, now = request.query, auth.caller().workspace_id, self.queries.now()
        check_visible(query)
        cohorts = await self.queries.cohorts(query, workspace_id)
        compiled = compile_funnel(query, workspace_id, now, cohorts)
        found = await self.queries.run(compiled, workspace_id, query.source_ids)
        return RunFunnelResponse(result=read_funnel(query, found))

    async def RunRetention(self, request: RunRetentionRequest, context: Context) -> RunRetentionResponse:
        query, workspace_id, now = request.query, auth.caller().workspace_id, self.queries.now()
        check_visible(query)
        cohorts = await self.queries.cohorts(query, workspace_id)
        compiled, periods = compile_retention(query, workspace_id, now, cohorts)
        found = await self.queries.run(compiled, workspace_id, query.source_ids)
        return RunRetentionResponse(result=read_retention(query, periods, found, now))

    async def RunPaths(self, request: RunPathsRequest, context: Context) -> RunPathsResponse:
        query, workspace_id, now = request.query, auth.caller().workspace_id, self.queries.now()
        check_visible(query)
        cohorts = await self.queries.cohorts(query, workspace_id)
        compiled = compile_paths(query, workspace_id, now, cohorts)
        found = await self.queries.run(compiled, workspace_id, query.source_ids)
        return RunPathsResponse(result=read_paths(query, found))

    async def RunLifecycle(self, request: RunLifecycleRequest, context: Context) -> RunLifecycleResponse:
        query, workspace_id, now = request.query, auth.caller().workspace_id, self.queries.now()
        check_visible(query)
        cohorts = await self.queries.cohorts(query, workspace_id)
        compiled, periods = compile_lifecycle(query, workspace_id, now, cohorts)
        found = await self.queries.run(compiled, workspace_id, query.source_ids)
        return RunLifecycleResponse(result=read_lifecycle(periods, found, now))
