"""The catalogue of permissions: what each one opens, as the contracts of all services say."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from meshboard.options.v1 import access_pb2
from meshboard.user.v1.role_pb2 import Permission

from services.chassis import errors
from services.chassis.permissions import RESERVED, require_known
from services.chassis.rights import PERMISSIONS, ROLES, view_of

WORKSPACE = "workspace"
# Every member finds the workspace itself.
MEMBERSHIP = "workspaces.view"
# What is no act on something that is there, and so needs no sight of it.
_SIGHTLESS = ("view", "list", "create")


def catalogue(contracts: FileDescriptorSet) -> list[Permission]:
    """All permissions by name."""
    methods: dict[str, set[str]] = defaultdict(set)
    types: dict[str, set[str]] = defaultdict(set)
    for method, access in _accesses(contracts):
        needs: list[access_pb2.Access | access_pb2.Access.Need] = [access, *access.also]
        for need in needs:
            methods[need.permission].add(method)
            types[need.permission] |= _types_of(need)
    return [
        Permission(
            name=name,
            resource_types=sorted(types[name] or {WORKSPACE}),
            methods=sorted(methods[name]),
            builtin_roles=[role for role, permissions in ROLES.items() if name in permissions],
            owner_only=name in RESERVED,
        )
        for name in sorted(PERMISSIONS)
    ]


def require_complete(names: Iterable[str], field: str) -> list[str]:
    """The permissions of a custom role, sorted.

    Raises INVALID_ARGUMENT: PERMISSION_UNKNOWN, PERMISSION_RESERVED, or PERMISSION_INCOMPLETE when one to act comes
    without the one to see.
    """
    permissions = set(names)
    for name in sorted(permissions):
        require_known(name, field)
        if name in RESERVED:
            raise errors.invalid_argument(
                "PERMISSION_RESERVED", f"Only owners have {name}.", field=field, permission=name
            )
    needed = {MEMBERSHIP: "every role"} | {
        view_of(name): name for name in sorted(permissions) if name.partition(".")[2] not in _SIGHTLESS
    }
    for missing, because in needed.items():
        if missing in PERMISSIONS - permissions:
            raise errors.invalid_argument(
                "PERMISSION_INCOMPLETE",
                f"{missing} is missing, which goes with {because}.",
                field=field,
                missing=missing,
            )
    return sorted(permissions)


def _accesses(contracts: FileDescriptorSet) -> Iterator[tuple[str, access_pb2.Access]]:
    for file in contracts.file:
        for service in file.service:
            for method in service.method:
                name = f"{file.package}.{service.name}.{method.name}"
                yield name, method.options.Extensions[access_pb2.access]


def _types_of(need: access_pb2.Access | access_pb2.Access.Need) -> set[str]:
    """`dashboard` for `dashboard_id`, `source` for `query.source_ids`, `folder` for `parent_folder_id`."""
    field = need.resource.rpartition(".")[2]
    resource_type = field.removesuffix("s").removesuffix("_id").removeprefix("parent_")
    return {resource_type or WORKSPACE} | ({WORKSPACE} if need.or_workspace else set())
