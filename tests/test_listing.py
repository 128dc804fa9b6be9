"""Folders listed and walked: what pathlib finds, in its order, and errors where pathlib finds nothing."""

from __future__ import annotations

import errno
import os
import sys

import pytest
from permissions import forbidden

from gpuparse import listing

GLOBS = [
    "*",
    "*/*",
    "*/*.nii",
    "a/*.nii",
    "a*/x*",
    "*/b/*",
    "*/b",
    "*/b/one.nii",
    "absent/*",
    "one.nii/*",
    "*c*e*",
    "./a/*",
]


@pytest.fixture
def tree(tmp_path):
    """Files, folders, hidden ones and links of every kind."""
    root = tmp_path / "tree"
    for name in ("one.nii", "a/one.nii", "a/x2.nii", "a-b/x1.nii", "a/b/one.nii", "z/b/one.nii", ".hid/deep.nii",
                 "a/.hid.nii", "a/b/c/d/e.txt", "a b/line\nbreak.nii", "lost+found/x.nii"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "empty").mkdir()
    (root / "to-folder").symlink_to("a")
    (root / "a/up").symlink_to("..")
    (root / "to-file.nii").symlink_to("a/one.nii")
    (root / "to-nothing.nii").symlink_to("absent")
    (root / "to-itself").symlink_to("to-itself")
    os.mkfifo(root / "a/pipe.nii")
    return root


def refuse(path, error):
    raise error


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="what rglob makes of links is that of Python 3.11")
def test_files_are_those_of_rglob_in_its_order(tree):
    expected = [p for p in sorted(tree.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    assert len(expected) > 9
    assert listing.files_below(tree) == expected
    assert listing.files_below(tree / "to-folder") == [p for p in sorted((tree / "to-folder").rglob("*"))
                                                       if p.is_file() and not p.name.startswith(".")]  # fmt: skip


@pytest.mark.parametrize("folders", [False, True])
@pytest.mark.parametrize("glob", GLOBS)
def test_matches_are_those_of_glob_in_its_order(tree, glob, folders):
    expected = [path for path in sorted(tree.glob(glob)) if path.is_dir() == folders]
    assert listing.matches_below(tree, glob, folders=folders, on_error=refuse) == expected


def test_the_globs_match_something(tree):
    found = {(glob, folders): listing.matches_below(tree, glob, folders=folders, on_error=refuse)
             for glob in GLOBS for folders in (False, True)}  # fmt: skip
    assert sum(bool(paths) for paths in found.values()) > len(GLOBS)


def test_subfolders_are_those_that_iterdir_knows(tree):
    expected = [path for path in sorted(tree.iterdir()) if path.is_dir() and path.name != "lost+found"]
    assert listing.subfolders(tree) == expected
    assert {"to-folder", ".hid"} < {path.name for path in expected}


@pytest.mark.parametrize("name", ["one.nii", "a", "to-folder", "to-file.nii", "to-nothing.nii", "to-itself", "no\0t",
                                  "one.nii/x", "absent"])  # fmt: skip
def test_what_is_a_folder_is_what_pathlib_takes_for_one(tree, name):
    assert listing.is_folder(tree / name) == (tree / name).is_dir()
    if "\0" not in name:
        assert listing.names_in(tree / name) == (sorted(os.listdir(tree / name)) if (tree / name).is_dir() else [])


def test_what_cannot_be_read_is_an_error(tree):
    with forbidden(tree / "a/b", tree / "empty"):
        for search in (listing.files_below, listing.names_in, listing.subfolders):
            with pytest.raises(PermissionError, match=r"empty'"):
                search(tree / "empty")
        with pytest.raises(PermissionError, match=r"a/b'"):
            listing.files_below(tree)
        with pytest.raises(PermissionError, match=r"a/b/c'"):
            listing.is_folder(tree / "a/b/c")
        told = []
        found = listing.matches_below(tree, "a/*/*.nii", folders=False, on_error=lambda *what: told.append(what))
        assert [path.relative_to(tree).as_posix() for path in found] == ["a/up/one.nii", "a/up/to-file.nii",
                                                                         "a/up/to-nothing.nii"]  # fmt: skip
        assert [(path, error.errno) for path, error in told] == [(tree / "a/b", errno.EACCES)]


def test_a_link_to_where_nobody_may_look_is_not_passed_over(tree):
    (tree / "linked").symlink_to("a/b/c")
    (tree / "empty/linked.nii").symlink_to("../a/b/one.nii")
    with forbidden(tree / "a/b"):
        assert tree / "linked" in listing.subfolders(tree)
        told = []
        listing.matches_below(tree, "link*", folders=True, on_error=lambda *what: told.append(what))
        assert [(path, error.errno) for path, error in told] == [(tree / "linked", errno.EACCES)]
        with pytest.raises(PermissionError, match=r"linked\.nii'"):
            listing.files_below(tree / "empty")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_mount_that_is_lost_is_an_error(tree, monkeypatch, number):
    scandir, listdir = os.scandir, os.listdir

    def lost(usual):
        def call(path):
            if os.fspath(path).endswith("/a/b"):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return usual(path)

        return call

    monkeypatch.setattr(os, "scandir", lost(scandir))
    monkeypatch.setattr(os, "listdir", lost(listdir))
    for call in (
        lambda: listing.files_below(tree),
        lambda: listing.names_in(tree / "a/b"),
        lambda: listing.matches_below(tree, "*/b/*", folders=False, on_error=refuse),
    ):
        with pytest.raises(OSError, match=r"a/b'") as caught:
            call()
        assert caught.value.errno == number
