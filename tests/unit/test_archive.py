"""The directory of saved cluster states: who may change it when, and what an interruption leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from sheepdog.tools.dog.archive import FORMAT, Archive, ArchiveError, State


def saved(path: Path) -> Archive:
    """A directory with one state."""
    archive = Archive(path)
    with archive.locked():
        archive.add(State(1, "one", 0, 0, 1, 0, 22, objects={"1": [archive.put(b"data")]}))
    return archive


def test_nobody_changes_what_somebody_loads(tmp_path: Path) -> None:
    archive = saved(tmp_path)
    with archive.kept(), Archive(tmp_path).kept(), pytest.raises(ArchiveError, match="uses"), archive.locked():
        raise AssertionError("changed it")
    with archive.locked(), pytest.raises(ArchiveError, match="uses"), Archive(tmp_path).kept():
        raise AssertionError("took what changes")
    with archive.locked():
        pass


def test_what_was_never_saved_can_be_kept_without_writing(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    with archive.kept():
        assert archive.states() == []
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("left", [[], ["format"], ["format.12.34.part"]])
def test_who_was_killed_while_making_it_can_go_on(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text(FORMAT)
    assert [state.tag for state in saved(tmp_path).states()] == ["one"]


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mail").write_text("")
    with pytest.raises(ArchiveError, match="holds something else"):
        Archive(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mail"]
