"""URLs: secrets in them are refused, and not repeated in the message."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from typer.testing import CliRunner

import gpuparse
from gpuparse.cli import app
from gpuparse.errors import InputError
from gpuparse.export import export_store
from gpuparse.info.page import check_page_path
from gpuparse.preview import preview
from gpuparse.sample_data import make_sample_data
from gpuparse.urls import check_url, is_url


def test_urls_are_known_by_their_scheme():
    for url in ("s3://bucket", "gs://bucket/x", "az://container/x", "https://host/x", "http://host:9000/x"):
        assert is_url(url)
        check_url(url)
    for url in ("abfss://container@account.dfs.core.windows.net/stores", "https://host/a%20b/c.zarr"):
        check_url(url)
    assert not is_url("/data/DATASET1")
    for path in ("/data/s3://x", "a:b/c", "s3:bucket", "./s3://x", "", "data:/x"):
        assert not is_url(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gcs://bucket/A", r"'gcs://bucket/A' has the scheme 'gcs'; expected a path, or .*s3, .*Storage is gs://\."),
        ("file:///data/A", r"'file:///data/A' has the scheme 'file'; expected .*A path stands without file://\."),
        ("S3://bucket/A", r"has the scheme 'S3'; expected a path, or a URL with one of s3, .*https\.$"),
        ("hdfs://name/A", "has the scheme 'hdfs'; expected"),
        (
            PurePosixPath("s3://bucket/A"),
            "'s3:/bucket/A' lacks a slash, as a URL does that was made into a Path; expected",
        ),
    ],
)
def test_other_schemes_are_not_taken_for_folders(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_sample_data(tmp_path / "data")
    calls = [
        lambda: is_url(path),
        lambda: gpuparse.open_store(path),
        lambda: gpuparse.SliceDataset(path),
        lambda: gpuparse.info(path),
        lambda: gpuparse.check(path),
        lambda: gpuparse.VolumeDataset(path),
        lambda: gpuparse.convert(path, out_dir=tmp_path),
        lambda: gpuparse.convert("data", out_dir=path),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call()
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("path", ["s3://bucket/A", PurePosixPath("s3://bucket/A")])
def test_what_has_to_be_local_is_no_url(path, tmp_path):
    for call in (
        lambda: gpuparse.convert(tmp_path, out_dir="s3://bucket/B", work_dir=path),
        lambda: export_store(tmp_path, path),
        lambda: preview(tmp_path, path),
    ):
        with pytest.raises(InputError, match=r"(work|out)_dir is 's3:/.*', a URL; expected a local path\."):
            call()
    with pytest.raises(InputError, match=r"--html is 's3:/.*', a URL; expected a local path\."):
        check_page_path(Path(path))


def test_a_url_without_a_host_is_refused_and_not_shown():
    for call in (check_url, gpuparse.open_store, gpuparse.info):
        with pytest.raises(InputError, match=r"URL that begins with 'https://' has no valid host: .*IPv6") as caught:
            call("https://me:SECRET@[bad/x")
        assert "SECRET" not in str(caught.value)
    result = CliRunner().invoke(app, ["info", "https://[bad/x"])
    assert isinstance(result.exception, InputError)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://me:SECRET@host:9000/stores/A", "a name or a password"),
        ("https://SECRET@host/stores/A", "a name or a password"),
        ("s3://key:SECRET@bucket/stores/A", "a name or a password"),
        ("abfss://me:SECRET@host/stores/A", "a name or a password"),
        ("https://host/stores/A?sig=SECRET", "a query"),
        ("s3://bucket/stores/A#SECRET", "a fragment"),
    ],
)
def test_what_would_be_dropped_or_shown_is_refused_and_not_shown(url, found, tmp_path):
    calls = [
        lambda: check_url(url),
        lambda: gpuparse.open_store(url),
        lambda: gpuparse.SliceDataset(url),
        lambda: gpuparse.info(url),
        lambda: gpuparse.check(url),
        lambda: gpuparse.VolumeDataset(url),
        lambda: gpuparse.convert(url, out_dir=tmp_path, work_dir=tmp_path),
        lambda: gpuparse.convert(tmp_path, out_dir=url),
    ]
    for call in calls:
        with pytest.raises(InputError, match=rf"the URL '.*/stores/A' was given with {found}.*; expected") as caught:
            call()
        assert "SECRET" not in str(caught.value)
