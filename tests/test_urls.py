"""URLs: secrets in them are refused, and not repeated in the message."""

from __future__ import annotations

import pytest

import gpuparse
from gpuparse.errors import InputError
from gpuparse.urls import check_url, is_url


def test_urls_are_known_by_their_scheme():
    for url in ("s3://bucket", "gs://bucket/x", "az://container/x", "https://host/x", "http://host:9000/x"):
        assert is_url(url)
        check_url(url)
    for url in ("abfss://container@account.dfs.core.windows.net/stores", "https://host/a%20b/c.zarr"):
        check_url(url)
    assert not is_url("/data/DATASET1")
    assert not is_url("/data/s3://x")
    assert not is_url("C://data")


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
