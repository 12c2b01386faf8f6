from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from services.auth_svc.models import Table
from services.chassis import db
from tests.auth_svc.conftest import Services


async def test_tables_are_as_the_classes_say(services: Services):
    def differences(connection: Connection) -> list[object]:
        names = set(Table.metadata.tables)
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "include_name": lambda name, kind, _: kind != "table" or name in names,
            },
        )
        return list(compare_metadata(context, Table.metadata))

    async with db.engine(services.sessions).connect() as connection:
        assert await connection.run_sync(differences) == []
