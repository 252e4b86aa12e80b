"""Folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from tvlens.errors import StudyError


def _write(out: Path, text: str = "x", force: bool = False) -> None:
    from tvlens.compose.folders import whole_folder

    with whole_folder(out, force=force, own="own") as folder:
        (folder / "own").write_text(text)


def test_it_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    from tvlens.compose.folders import whole_folder

    out = tmp_path / "new" / "m"
    with whole_folder(out, force=False, own="own") as folder:
        (folder / "own").write_text("x")
        assert not out.exists()
        assert folder.parent == out.parent
    assert (out / "own").read_text() == "x"
    assert [*out.parent.iterdir()] == [out]


def test_an_exception_leaves_nothing_and_the_old_one(tmp_path: Path) -> None:
    from tvlens.compose.folders import whole_folder

    def interrupted(force: bool) -> None:
        with whole_folder(tmp_path / "m", force=force, own="own") as folder:
            (folder / "own").write_text("new")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        interrupted(False)
    assert [*tmp_path.iterdir()] == []
    _write(tmp_path / "m", "old")
    with pytest.raises(KeyError):
        interrupted(True)
    assert (tmp_path / "m" / "own").read_text() == "old"
    assert [*tmp_path.iterdir()] == [tmp_path / "m"]


@pytest.mark.parametrize("exchanging", [True, False])
def test_force_replaces_its_own_and_nothing_else(
    tmp_path: Path, exchanging: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvlens.compose import folders

    if not exchanging:
        monkeypatch.setattr(folders, "_exchanged", lambda first, second: False)
    _write(tmp_path / "m", "old")
    with pytest.raises(StudyError, match="is there already"):
        _write(tmp_path / "m", "new")
    _write(tmp_path / "m", "new", force=True)
    assert (tmp_path / "m" / "own").read_text() == "new"
    assert [*tmp_path.iterdir()] == [tmp_path / "m"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    for name in ("file", "link", "empty"):
        with pytest.raises(StudyError, match="was not written by tvlens"):
            _write(tmp_path / name, force=True)


def test_what_a_dead_run_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    from tvlens.compose.folders import whole_folder

    for name in (".m-dead.partial", ".m[x]-dead.partial", ".other-dead.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    with whole_folder(tmp_path / "m", force=False, own="own") as living:
        (living / "own").write_text("slow")
        _write(tmp_path / "m", "fast")
        assert living.is_dir()
        assert not (tmp_path / ".m-dead.partial").exists()
        (tmp_path / "m" / "own").unlink()
        (tmp_path / "m").rmdir()
    assert (tmp_path / "m" / "own").read_text() == "slow"
    assert {p.name for p in tmp_path.iterdir()} == {
        "m",
        ".m[x]-dead.partial",
        ".other-dead.partial",
    }
    _write(tmp_path / "m[x]")
    assert not (tmp_path / ".m[x]-dead.partial").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StudyError, match="cannot be written: Permission denied"):
            _write(tmp_path / "m")
    finally:
        tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StudyError, match="cannot be written"):
        _write(tmp_path / "file" / "m")
