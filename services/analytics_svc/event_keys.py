"""What events are known by: a hash of source and `insert_id`, small enough to remember those of a week."""

import sys
from array import array
from collections.abc import Iterable

import xxhash


def key_of(source_id: str, insert_id: str) -> int:
    """The same as xxh3(concat(source_id, insert_id)) in the store.

    Who makes keys collide has theirs looked up, which costs what a repeated event costs; they count all the same.
    """
    return xxhash.xxh3_64_intdigest((source_id + insert_id).encode())


def keys_of(source_id: str, insert_ids: Iterable[bytes]) -> bytes:
    """The keys of events of a source, 8 bytes each, as `LoggedBatch.keys` has them. The ids are in UTF-8."""
    keys = array("Q", map(xxhash.xxh3_64_intdigest, map(source_id.encode().__add__, insert_ids)))
    if sys.byteorder == "big":
        keys.byteswap()
    return keys.tobytes()
