"""Remote stores: batches are those of the local store, whatever the network does, or there is an error that says why."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch
from object_store import serve

import gpuparse
from gpuparse import remote
from gpuparse.errors import InputError, MissingDependencyError, StorageError, StoreFormatError
from gpuparse.read import ChunkReader, SliceKey, decode_on_host
from gpuparse.remote import RemoteOptions, is_url

pytest.importorskip("moto.server")
pytest.importorskip("obstore")

ENVIRONMENT = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "aws_region": "us-east-1"}


@pytest.fixture(scope="module")
def running(sample_stores):
    for server in serve():
        for name, path in sample_stores.items():
            server.upload(path.parent, f"data/{name}")
        yield server


@pytest.fixture
def server(running):
    yield running
    running.settle()


@pytest.fixture
def options(server):
    return RemoteOptions(
        num_attempts=3, timeout_seconds=20, backoff_seconds=0.0, config={**ENVIRONMENT, "endpoint": server.endpoint}
    )


def keys_of(store, step=3):
    table = store.slices
    return [
        SliceKey(store, int(table.case[i]), int(table.axis[i]), int(table.position[i]))
        for i in range(0, len(table), max(1, len(table) // (step * 10)))
    ]


def decoded(reader, store):
    slices = reader.fetch(keys_of(store), (64, 64))
    return slices, decode_on_host(slices)


def gets(server, part="/c/"):
    return [(path, span) for method, path, span in server.requests if method == "GET" and part in path]


@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS"])
def test_a_remote_store_reads_as_the_local_one(server, options, sample_stores, name):
    local = gpuparse.open_store(sample_stores[name])
    far = gpuparse.open_store(f"s3://bucket/data/{name}/train.zarr", remote=options)
    assert far.cases == local.cases
    for column, values in vars(local.slices).items():
        np.testing.assert_array_equal(getattr(far.slices, column), values)
    mine, arena = decoded(ChunkReader(), far)
    expected, expected_arena = decoded(ChunkReader(), local)
    np.testing.assert_array_equal(arena, expected_arena)
    np.testing.assert_array_equal(mine.blocks, expected.blocks)
    assert mine.counts.num_chunks == mine.counts.num_from_storage == expected.counts.num_chunks
    assert mine.counts.read_bytes == expected.counts.read_bytes
    assert mine.counts.extents == ()
    # Ranges only: a shard's index from its end, then its chunks.
    assert all(span is not None for _, span in gets(server))
