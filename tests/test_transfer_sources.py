"""Sources at a URL: what is fetched again, what is removed, what is left to the user and to other runs."""

from __future__ import annotations

import datetime
import json
import logging

import numpy as np
import pytest

import gpuparse
from gpuparse import fetch
from gpuparse.errors import InputError, StorageError, StoreWriteError
from gpuparse.fetch import download_sources
from gpuparse.foreign import ForeignFormat
from gpuparse.lock import StoreLock
from gpuparse.pairs import FolderLayout
from gpuparse.remote import ObjectInfo, RemotePath, RemoteSite

pytest.importorskip("object_store", reason="needs moto[server]")
pytest.importorskip("obstore")

PROMPTS = "class_prompts.json"
PROPOSAL = "class_prompts.proposed.json"


@pytest.fixture
def source(options):
    return RemotePath(RemoteSite("s3://bucket/src", options))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "work" / "src"


@pytest.fixture
def convert(options, tmp_path):
    """Converts foreign datasets below a URL; the work folder is one and the same."""

    def run(url="s3://bucket/src", **arguments):
        foreign = ForeignFormat(FolderLayout("nnunet"), "percentile")
        usual = {"out_dir": tmp_path / "out", "work_dir": tmp_path / "work", "remote": options, "foreign": foreign}
        return [dataset.name for dataset in gpuparse.convert(url, **usual | arguments).datasets]

    return run


def put_nnunet(server, name):
    nib = pytest.importorskip("nibabel", reason="needs gpuparse[formats]")
    rng = np.random.default_rng(0)
    for key, dtype, stop in (("imagesTr/c_0000.nii", np.int16, 99), ("labelsTr/c.nii", np.uint8, 2)):
        image = nib.Nifti1Image(rng.integers(0, stop, (20, 24, 5)).astype(dtype), np.diag([1.0, 1, 5, 1]))
        server.put(f"src/{name}/{key}", image.to_bytes())
    facts = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "thing": 1}, "file_ending": ".nii"}
    server.put(f"src/{name}/dataset.json", json.dumps(facts).encode())


def put_prompts(server, *names, key=f"src/{PROMPTS}"):
    server.put(key, json.dumps({name: {"1": ["thing"], "instance_label": 0} for name in names}).encode())


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fetched(server):
    return sorted(path.rpartition("/")[2] for method, path, _ in server.requests if method == "GET" and "?" not in path)


def test_a_file_that_was_replaced_within_a_second_is_fetched_again(server, source, folder, monkeypatch):
    server.put("src/A/train/a.npz", b"first")
    download_sources(source, folder, split="train")
    server.put("src/A/train/a.npz", b"other")
    list_objects = RemotePath.list_objects
    info = next(iter(list_objects(source).values()))
    then = (folder / "A/train/a.npz").stat().st_mtime

    def in_the_same_second(self):
        return {key: info._replace(modified_seconds=then) for key, info in list_objects(self).items()}

    monkeypatch.setattr(RemotePath, "list_objects", in_the_same_second)
    assert info.num_bytes == 5
    assert download_sources(source, folder, split="train").num_objects == 1
    assert files(folder) == {"A/train/a.npz": b"other"}
    assert download_sources(source, folder, split="train").num_objects == 0


@pytest.mark.parametrize("notes", [None, b"{", b"[1]", b'{"A/train/a.npz": [1]}'])
def test_without_notes_size_and_time_have_to_do(server, source, folder, notes):
    server.put("src/A/train/a.npz", b"first")
    download_sources(source, folder)
    path = folder.with_name("src.json")
    assert [ObjectInfo(*info).num_bytes for info in json.loads(path.read_bytes()).values()] == [5]
    path.unlink() if notes is None else path.write_bytes(notes)
    assert download_sources(source, folder).num_kept == 1
    assert set(json.loads(path.read_bytes())) == {"A/train/a.npz"}  # from now on they are there


def test_other_datasets_and_splits_stay_and_what_is_gone_goes(server, source, folder):
    keys = [f"{dataset}/{split}/{name}.npz" for dataset in "AB" for split in ("train", "test") for name in "xy"]
    for key in [*keys, PROMPTS]:
        server.put(f"src/{key}", key.encode())
    for datasets, split in ((["A"], "train"), (["B"], "train"), (["A"], "test")):
        download_sources(source, folder, split=split, datasets=datasets)
    stays = {key: key.encode() for key in [*keys[:6], PROMPTS]}
    assert files(folder) == stays
    server.requests.clear()
    download_sources(source, folder, split="train", datasets=["A"])
    assert fetched(server) == []
    for key in ("A/train/x.npz", "B/train/x.npz"):
        server.delete(f"src/{key}")
    (folder / f"A/train/.{'0a' * 16}.new").write_bytes(b"left by a run that was killed")
    download_sources(source, folder, split="train", datasets=["A"])
    del stays["A/train/x.npz"]
    assert files(folder) == stays
    server.delete("src/A/train/y.npz")
    download_sources(source, folder, split="train")
    assert not (folder / "A/train").exists()
    assert set(files(folder)) == {"A/test/x.npz", "A/test/y.npz", "B/train/y.npz", PROMPTS}


def test_fetching_into_one_folder_is_for_one_run_at_a_time(server, source, folder, options, tmp_path, monkeypatch):
    server.put("src/A/train/a.npz", b"x")
    monkeypatch.setattr("gpuparse.lock.GRACE_SECONDS", 0.0)
    with (
        StoreLock(folder),
        pytest.raises(
            StoreWriteError,
            match=r"work/src: another conversion is fetching these sources \(process .*or write elsewhere with --work",
        ),
    ):
        download_sources(source, folder)
    assert download_sources(source, folder).num_objects == 1
    assert not folder.with_name(".src.lock").exists()


def test_two_runs_convert_two_datasets_from_one_work_folder(server, options, write_case, data_dir, tmp_path):
    for dataset in ("ONE", "TWO"):
        for name in "ab":
            write_case(np.zeros((3, 18, 19), np.uint8), np.ones((3, 18, 19), np.uint8), name=name, dataset=dataset)
    server.upload(data_dir, "src")
    written = []

    def run(name, on_case=None):
        report = gpuparse.convert("s3://bucket/src", out_dir=tmp_path / "out", work_dir=tmp_path / "work",
                                  remote=options, datasets=(n for n in [name]), on_case=on_case)  # fmt: skip
        written.extend((dataset.name, dataset.num_written) for dataset in report.datasets)

    run("ONE", on_case=lambda result: run("TWO") if result.path.name == "a.npz" else None)
    assert written == [("TWO", 2), ("ONE", 2)]


def test_prompts_that_the_user_made_of_the_proposal_are_used(server, convert, tmp_path):
    put_nnunet(server, "X")
    with pytest.raises(InputError, match=r"sources-\w+/src/class_prompts\.json: no prompts for 'X'; .*rename it"):
        convert()
    (proposal,) = (tmp_path / "work").rglob(PROPOSAL)
    proposal.rename(proposal.with_name(PROMPTS))
    assert convert() == ["X"]
    assert proposal.with_name(PROMPTS).exists()
    # Those at the URL win once there are some, and go when they go: they are nobody's work here.
    put_prompts(server, "X", "Y")
    convert()
    assert json.loads(proposal.with_name(PROMPTS).read_text(encoding="utf-8")).keys() == {"X", "Y"}
    server.delete(f"src/{PROMPTS}")
    with pytest.raises(InputError, match="no prompts for 'X'"):
        convert()


def test_a_proposal_stays_while_it_is_read(server, source, folder):
    server.put("src/X/imagesTr/a.nii", b"x")
    folder.mkdir(parents=True)
    for name in (PROMPTS, PROPOSAL):
        (folder / name).write_bytes(b"{}")
    (folder / "stray.txt").write_bytes(b"")
    download_sources(source, folder)
    assert set(files(folder)) == {"X/imagesTr/a.nii", PROMPTS, PROPOSAL}


def test_prompts_that_were_edited_hold_until_those_at_the_url_change(server, source, folder, caplog):
    server.put("src/A/train/a.npz", b"x")
    server.put(f"src/{PROMPTS}", b"at the URL")
    download_sources(source, folder, split="train")
    assert download_sources(source, folder, split="train").num_kept == 2
    assert not caplog.records
    (folder / PROMPTS).write_bytes(b"edited")
    download_sources(source, folder, split="train")
    assert (folder / PROMPTS).read_bytes() == b"edited"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{PROMPTS} was edited after it was fetched; it is used until the one at the URL changes." in caplog.text
    server.put(f"src/{PROMPTS}", b"changed at the URL")
    download_sources(source, folder, split="train")
    assert (folder / PROMPTS).read_bytes() == b"changed at the URL"


def test_a_dataset_that_is_gone_at_the_url_is_none_any_more(server, convert):
    put_nnunet(server, "X")
    put_nnunet(server, "Y")
    put_prompts(server, "X", "Y")
    assert convert() == ["X", "Y"]
    for key in server.list_keys("src/Y/"):
        server.delete(key)
    assert convert() == ["X"]


def test_objects_that_mark_folders_are_no_files(server, source, folder):
    kept = {"X/imagesTr/a.nii": b"x", "X/empty.txt": b""}
    for key, content in kept.items():
        server.put(f"src/{key}", content)
    for key in ("", "X/", "X/imagesTr/"):
        server.put(f"src/{key}", b"")
    report = download_sources(source, folder)
    assert files(folder) == kept
    assert report.num_objects == 2


def test_a_foreign_dataset_at_a_url_is_called_as_the_url_is(server, convert, tmp_path):
    put_nnunet(server, "Dataset001_X")
    put_prompts(server, "Dataset001_X", key=f"src/Dataset001_X/{PROMPTS}")
    for url, datasets in (("s3://bucket/src/Dataset001_X", None), ("s3://bucket/src/Dataset001_X/", ["Dataset001_X"])):
        assert convert(url, datasets=datasets) == ["Dataset001_X"]
    assert (tmp_path / "out/Dataset001_X/train.zarr").is_dir()
    with pytest.raises(InputError, match=r"Dataset001_X: no Dataset002_Y\. Datasets with images there: Dataset001_X\."):
        convert("s3://bucket/src/Dataset001_X", datasets=["Dataset002_Y"])


def test_a_long_name_is_fetched_and_large_files_in_small_pieces(server, source, folder, monkeypatch):
    content = bytes(range(100))
    key = f"A/train/{'n' * 251}.npz"
    server.put(f"src/{key}", content)
    monkeypatch.setattr(fetch, "_PIECE_BYTES", 30)
    download_sources(source, folder, split="train")
    assert files(folder) == {key: content}
    ranges = sorted(span for method, path, span in server.requests if path.endswith(".npz"))
    assert ranges == ["bytes=0-29", "bytes=30-59", "bytes=60-89", "bytes=90-99"]


def test_pieces_get_through_a_slow_line_in_time():
    options = gpuparse.RemoteOptions()
    assert fetch._PIECE_BYTES * options.num_connections / options.timeout_seconds < 2.5e6  # 20 Mbit/s


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_source_that_changes_while_it_is_fetched_is_named(server, source, folder, monkeypatch, change):
    for name in "ab":
        server.put(f"src/A/train/{name}.npz", b"x")
    list_objects = RemotePath.list_objects

    def too_late(self):
        found = list_objects(self)
        server.delete("src/A/train/b.npz") if change == "removed" else server.put("src/A/train/b.npz", b"y")
        return found

    monkeypatch.setattr(RemotePath, "list_objects", too_late)
    with pytest.raises(StorageError, match=rf"src/A/train/b\.npz' was {change} while it was fetched\. Run the command"):
        download_sources(source, folder, split="train")
    monkeypatch.undo()
    download_sources(source, folder, split="train")
    assert set(files(folder)) == ({"A/train/a.npz"} if change == "removed" else {"A/train/a.npz", "A/train/b.npz"})


def test_other_failures_of_fetching_stay_what_they_are(server, source, folder):
    server.put("src/A/train/a.npz", b"x")
    server.always["a.npz"] = "403"
    with pytest.raises(StorageError, match=r"a\.npz' cannot be read: the server refuses"):
        download_sources(source, folder, split="train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"datasets": 5}, "datasets is 5; expected a list of names, or None for all"),
        ({"datasets": "ONE"}, r"datasets is the string 'ONE'; expected a list of names, such as \['ONE'\]"),
        ({"datasets": [5]}, r"datasets is \[5\]; expected a list of names, or None for all"),
        ({"split": 5}, "split 5 cannot be used"),
        ({"remote": {"num_attempts": 3}}, r"remote is dict; expected gpuparse.RemoteOptions"),
        ({"out_dir": "https://host/stores"}, "out_dir is 'https://host/stores', a web server, which takes no stores"),
        ({"out_dir": "http://host/stores"}, "out_dir is 'http://host/stores', a web server"),
    ],
)
def test_arguments_are_checked_before_anything_is_fetched(server, options, tmp_path, arguments, message):
    server.put("src/A/train/a.npz", b"x")
    usual = {"out_dir": tmp_path / "out", "work_dir": tmp_path / "work", "remote": options}
    with pytest.raises(InputError, match=message):
        gpuparse.convert("s3://bucket/src", **usual | arguments)
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_a_file_is_that_of_its_object(server, source, folder):
    server.put("src/A/train/a.npz", b"x")
    download_sources(source, folder, split="train")
    (info,) = source.list_objects().values()
    assert (folder / "A/train/a.npz").stat().st_mtime == info.modified_seconds
    assert abs(datetime.datetime.now().timestamp() - info.modified_seconds) < 3600
