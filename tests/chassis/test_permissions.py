import grpc
import pytest

from services.chassis.errors import Error
from services.chassis.permissions import RESERVED, permission_set, require_known


def test_what_is_reserved_for_owners():
    assert {"workspaces.delete", "workspaces.transfer"} == RESERVED


def test_equal_sets_are_one_object():
    names = ("members.view", "workspaces.view")
    assert permission_set(names) is permission_set(tuple(names))
    assert permission_set(names) == set(names)


def test_names_what_was_meant():
    require_known("dashboards.edit", "permission")
    with pytest.raises(Error) as raised:
        require_known("dashboard.edit", "permissions")
    error = raised.value
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PERMISSION_UNKNOWN")
    assert "dashboards.edit" in error.metadata["nearest"]
    assert error.violations[0][0] == "permissions"
    with pytest.raises(Error) as raised:
        require_known("x" * 64, "permissions")
    assert raised.value.metadata["nearest"] == ""
