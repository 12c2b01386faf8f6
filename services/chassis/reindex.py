"""Builds the index of a service anew, by hand: `python -m services.<service>.reindex [-o json]`, for `./dev reindex`.

Talk goes to stderr, the outcome to stdout. Exit code 0: done. 1: somebody else is building the index. 3: PostgreSQL
or the search engine does not answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable

import structlog

from services.chassis import db as chassis_db
from services.chassis.indexing import INTERRUPTIONS, Corpus, Indexer, RebuildRuns
from services.chassis.search_engines import engine_of
from services.chassis.settings import Settings, load

_TELL_SECONDS = 1.0


def main(corpus: Corpus) -> None:
    """Rebuilds the index of this process' service."""
    settings, name = load(Settings), corpus.index.name
    # stdout is for the outcome, and what failed is said plainly.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    began = time.monotonic()
    try:
        documents = asyncio.run(_rebuild(settings, corpus))
    except RebuildRuns:
        print(f"{name}: somebody else is building it", file=sys.stderr)
        raise SystemExit(1) from None
    except INTERRUPTIONS as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    outcome = {"index": name, "documents": documents, "seconds": round(time.monotonic() - began, 1)}
    if sys.argv[1:] == ["-o", "json"]:
        print(json.dumps(outcome))
    else:
        print(f"{name}: {documents} documents in {outcome['seconds']} s")


async def _rebuild(settings: Settings, corpus: Corpus) -> int:
    db = chassis_db.connect(settings.postgres_url, 2)
    engine = engine_of(settings, db)
    try:
        return await Indexer(settings.postgres_url, db, engine, corpus).rebuild(_teller(corpus.index.name))
    finally:
        await engine.close()
        await chassis_db.engine(db).dispose()


def _teller(name: str) -> Callable[[int, int], None]:
    said = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _TELL_SECONDS or done == total:
            said = time.monotonic()
            print(f"{name}: {done} of {total}", file=sys.stderr)

    return tell
