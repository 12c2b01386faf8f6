"""Which fields an update changes (https://google.aip.dev/134)."""

from __future__ import annotations

from collections.abc import Collection

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from services.chassis import errors


def changed_fields(resource: Message, mask: FieldMask, mutable: Collection[str]) -> set[str]:
    """The fields that the mask names, `*` for all that are mutable; without a mask, the mutable fields that are set.

    Raises INVALID_ARGUMENT (UPDATE_MASK_INVALID) when the mask names a field that is not among `mutable`.
    """
    if not mask.paths:
        return {descriptor.name for descriptor, _ in resource.ListFields()} & set(mutable)
    if list(mask.paths) == ["*"]:
        return set(mutable)
    if unknown := sorted(set(mask.paths) - set(mutable)):
        raise errors.invalid_argument(
            "UPDATE_MASK_INVALID",
            f"{unknown[0]!r} cannot be changed; what can is {', '.join(sorted(mutable))}.",
            field="update_mask",
            path=unknown[0],
        )
    return set(mask.paths)
