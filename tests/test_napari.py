"""Cases in napari: what its readers make of a store's case is the volume, in millimetres; no screen is needed.

Neither package is in the test extra: ome-zarr demands fsspec[s3], whose botocore is not the one that moto demands.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

CASES = [("SAMPLE_CT", "case_001"), ("SAMPLE_CELLS", "case_002")]  # uint8 labels, uint16 labels in cubic chunks
PAGE = (Path(__file__).parents[1] / "docs" / "napari.md").read_text(encoding="utf-8")


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def case(request, sample_dir, sample_stores):
    """(folder of a case, its volume)"""
    dataset, name = request.param
    with np.load(sample_dir / dataset / "train" / f"{name}.npz") as volume:
        return sample_stores[dataset] / "cases" / name, dict(volume)


def test_the_ome_zarr_reader_gives_the_volume_in_millimetres(case):
    pytest.importorskip("ome_zarr.reader", reason="ome-zarr is not installed (docs/napari.md)")
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    folder, volume = case
    image, _, labels = Reader(parse_url(str(folder)))()
    for node, expected in ((image, volume["imgs"]), (labels, volume["gts"])):
        (found,) = (np.asarray(level) for level in node.data)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        assert [(axis["name"], axis["unit"]) for axis in node.metadata["axes"]] == [(a, "millimeter") for a in "zyx"]
        ((transformation,),) = node.metadata["coordinateTransformations"]
        assert transformation == {"type": "scale", "scale": volume["spacing"][::-1].tolist()}


def test_naparis_plugin_gives_the_volume_in_millimetres(case):
    reader = pytest.importorskip("napari_ome_zarr", reason="napari-ome-zarr is not installed (docs/napari.md)")
    folder, volume = case
    (image, image_options, kind), (labels, label_options, label_kind) = reader.napari_get_reader(str(folder))(
        str(folder)
    )
    assert (kind, label_kind) == ("image", "labels")
    for layers, options, expected in ((image, image_options, volume["imgs"]), (labels, label_options, volume["gts"])):
        np.testing.assert_array_equal(np.asarray(layers[0]), expected)
        assert list(options["scale"]) == volume["spacing"][::-1].tolist()
        assert set(options["units"]) == {"millimeter"}


def test_a_case_is_what_the_page_says_it_is(case):
    """Without the packages: what both go by, and the page names a case of the demo."""
    import zarr
    from ome_zarr_models.v05.image import Image
    from ome_zarr_models.v05.image_label import ImageLabel

    folder, volume = case
    for model, path, expected in ((Image, "", volume["imgs"]), (ImageLabel, "labels/gts", volume["gts"])):
        group = zarr.open_group(folder / path, mode="r")
        (scale,) = model.from_zarr(group).attributes.ome.multiscales[0].datasets[0].coordinateTransformations
        assert list(scale.scale) == volume["spacing"][::-1].tolist()
        np.testing.assert_array_equal(group["0"][...], expected)
    assert set(re.findall(r"SAMPLE_CT/train\.zarr/cases/(\w+)", PAGE)) == {"case_001"}
