from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from cli.envoy_config import REPOSITORY

FOLDERS = sorted(REPOSITORY.glob("services/*/migrations"))


def test_there_are_migrations() -> None:
    assert len(FOLDERS) == 4


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_files_are_named_by_their_revision_and_the_last_is_the_head(folder: Path) -> None:
    # By the names a service sees at its start that there is nothing to migrate.
    scripts = ScriptDirectory(str(folder))
    names = sorted(path.name.partition("_")[0] for path in folder.glob("versions/[0-9]*.py"))
    assert names == sorted(script.revision for script in scripts.walk_revisions())
    assert scripts.get_heads() == [names[-1]]
