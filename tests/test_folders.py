"""Folders that are replaced as a whole."""

import fcntl
import os

import pytest

from gpuparse import folders


@pytest.fixture
def pair(tmp_path):
    for name in ("new", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    return tmp_path / "new", tmp_path / "there"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(pair, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    folders.replace_folder(*pair)
    assert [path.name for path in pair[1].parent.iterdir()] == ["there"]
    assert (pair[1] / "text").read_text() == "new"


def test_without_exchange_a_rename_that_fails_leaves_what_was_there(pair, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    original = os.rename

    def fail(source, target):
        if source == pair[0]:
            raise OSError("made to fail")
        original(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="made to fail"):
        folders.replace_folder(*pair)
    assert sorted(path.name for path in pair[1].parent.iterdir()) == ["new", "there"]
    assert (pair[1] / "text").read_text() == "there"


def fail_half_way(path):
    path.write_text("half")
    raise OSError("made to fail")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, is_there):
    path = tmp_path / "text"
    if is_there:
        path.write_text("old")
    with pytest.raises(OSError, match="made to fail"), folders.replacing(path) as temporary:
        fail_half_way(temporary)
    assert [found.read_text() for found in tmp_path.iterdir()] == ["old"] * is_there
    with folders.replacing(path, ".npz") as temporary:
        temporary.write_text("new")
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".npz")
        assert len(list(tmp_path.iterdir())) == 1 + is_there
    assert [found.read_text() for found in tmp_path.iterdir()] == ["new"]


def test_only_what_replacing_was_writing_is_removed(tmp_path):
    with folders.replacing(tmp_path / "text") as temporary:
        assert folders.is_unfinished(temporary.name)
        temporary.write_text("new")
    (tmp_path / temporary.name).write_text("left by a process that was killed")
    others = [".settings.new", f".{'a' * 31}.new", f".{'a' * 32}.new.txt", f"x.{'a' * 32}.new", "text"]
    for name in others:
        (tmp_path / name).write_text(name)
    (tmp_path / f".{'b' * 32}.new").mkdir()
    folders.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, f".{'b' * 32}.new"])
    folders.remove_unfinished(tmp_path / "absent")


def test_a_process_that_is_forked_meanwhile_does_not_keep_others_out(tmp_path):
    there, here = os.pipe()
    with folders.alone(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(here)
            os.read(there, 1)  # until the test has ended
            os._exit(0)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
        os.close(there)
        os.close(here)
        os.waitpid(child, 0)
