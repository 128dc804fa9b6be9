"""What `augment` refuses, by name; and the smallest batches it must take."""

from __future__ import annotations

import numpy as np
import pytest

from gpuparse.augment import LabelSpec, OutputTypes, augment, finish_batch
from gpuparse.errors import GpuparseError, InputError
from gpuparse.sampling import identity_params
from gpuparse.views import PLANE_DTYPE, resampling_tables


def good(**changes):
    """Arguments that work, some of them changed."""
    image = np.zeros((2, 3, 16, 16), np.uint8)
    arguments = {"image": image, "mask": image[:, 0], "params": identity_params(2), "class_ids": [[1, 2]] * 2}
    return {**arguments, **changes}


class OnDevice:
    """Looks like a CuPy array to the argument checks."""

    __module__ = "cupy"

    def __init__(self, shape, dtype="uint8"):
        self.shape, self.ndim, self.dtype = shape, len(shape), dtype

    def __len__(self):
        return self.shape[0]


def test_the_arguments_of_these_tests_work():
    assert augment(**good()).labels.shape == (2, 2, 16, 16)
    assert augment(**good(num_threads=1)).labels.shape == (2, 2, 16, 16)


IMAGE = np.zeros((2, 3, 16, 16), np.uint8)
MASK = np.zeros((2, 16, 16), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": IMAGE.tolist()}, r"^image is list; expected a numpy or CuPy array"),
        ({"image": None}, r"^image is NoneType; expected a numpy or CuPy array"),
        ({"mask": MASK.tolist()}, r"^mask is list; expected a numpy or CuPy array"),
        ({"mask": OnDevice((2, 16, 16))}, r"^mask is a cupy array; expected it on the same device as the image"),
        ({"image": OnDevice((2, 3, 16, 16))}, r"^mask is a numpy array; expected it on the same device as the image"),
        ({"image": IMAGE[0]}, r"^image has shape \(3, 16, 16\); expected 4 axes, none of them empty"),
        ({"image": IMAGE[:, :, :0]}, r"^image has shape \(2, 3, 0, 16\); expected 4 axes, none of them empty"),
        ({"mask": IMAGE}, r"^mask has shape \(2, 3, 16, 16\); expected 3 axes, none of them empty"),
        ({"mask": MASK[:, :0]}, r"^mask has shape \(2, 0, 16\); expected 3 axes"),
        ({"image": IMAGE.astype(np.float32)}, r"^image has dtype float32; expected uint8\."),
        ({"image": IMAGE.astype(np.int8)}, r"^image has dtype int8; expected uint8\."),
        ({"mask": MASK.astype(np.int64)}, r"^mask has dtype int64; expected uint8 or uint16 or uint32"),
        ({"mask": MASK.astype(bool)}, r"^mask has dtype bool; expected uint8 or uint16 or uint32"),
        ({"mask": MASK.astype(">u2")}, r"^mask has dtype >u2; expected uint8 or uint16 or uint32"),
        (
            {"image": np.zeros((2, 1, 16, 16), np.uint8)},
            r"^image has shape \(2, 1, 16, 16\) and mask \(2, 16, 16\); exp",
        ),
        ({"image": IMAGE.transpose(0, 2, 3, 1).copy()}, r"expected \(batch, 3, height, width\) and \(batch, rows, col"),
        ({"mask": MASK[:1]}, r"^image has shape \(2, 3, 16, 16\) and mask \(1, 16, 16\); expected \(batch, 3,"),
        (
            {"class_ids": [["a"], ["b"]]},
            r"^class_ids is \[\['a'\], \['b'\]\]; expected \(batch, num_prompts\) class ids",
        ),
        ({"class_ids": [[1], [1, 2]]}, r"^class_ids is \[\[1\], \[1, 2\]\]; expected \(batch, num_prompts\) class ids"),
        ({"class_ids": [[1.5], [1]]}, r"^class_ids is \[\[1\.5\], \[1\]\]; expected"),
        ({"class_ids": [[2**70], [1]]}, r"^class_ids is \[\[1180591620717411303424\], \[1\]\]; expected"),
        ({"num_threads": 0}, r"^num_threads is 0; expected a whole number of at least 1, or None for all cores"),
        ({"labels": ["prompts"]}, r"^labels is \['prompts'\]; expected 'prompts', 'instances'"),
        ({"labels": "boxes"}, r"^labels is 'boxes'; expected 'prompts', 'instances', 'classes' or 'foreground'"),
        ({"class_ids": None}, r"^class_ids has shape \(0,\); expected \(batch, num_prompts\) with batch 2"),
        ({"class_ids": [1, 2]}, r"^class_ids has shape \(2,\); expected \(batch, num_prompts\)"),
        ({"class_ids": [[1]]}, r"^class_ids has shape \(1, 1\); expected \(batch, num_prompts\) with batch 2"),
        ({"class_ids": [[], []]}, r"^class_ids has shape \(2, 0\); expected \(batch, num_prompts\)"),
        ({"class_ids": None, "labels": "instances"}, r"^class_ids has shape \(0,\)"),
        ({"class_ids": None, "labels": "foreground"}, r"^class_ids has shape \(0,\)"),
        ({"class_ids": [[1, -1], [0, 1]]}, r"^class_ids has values -1\.\.1; expected 0 to 2\^31 - 1"),
        ({"class_ids": [[1, 2**31], [0, 1]]}, r"^class_ids has values 0\.\.2147483648; expected 0 to 2\^31 - 1"),
        ({"recipe": "exact"}, r"^recipe is 'exact'; expected 'corrected' or 'reference'"),
        ({"image_dtype": "float64"}, r"^image_dtype is 'float64'; expected 'float32', 'float16' or 'bfloat16'"),
        ({"labels_dtype": "int32"}, r"^labels_dtype is 'int32'; expected 'int64' or 'uint8'"),
        ({"params": None}, r"^params is NoneType; expected \(2,\) of PARAMS_DTYPE, as sample_params returns it"),
        ({"params": identity_params(3)}, r"^params is \(3,\) .*; expected \(2,\) of PARAMS_DTYPE"),
        ({"params": np.zeros(2)}, r"^params is \(2,\) float64; expected \(2,\) of PARAMS_DTYPE"),
        ({"params": identity_params(2)[:, None]}, r"^params is \(2, 1\) .*; expected \(2,\) of PARAMS_DTYPE"),
    ],
)
def test_unusable_arguments_are_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message) as error:
        augment(**good(**changes))
    assert isinstance(error.value, GpuparseError)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotate", 4, r"params\['rotate'\] has values \[0 4\]; expected 0 to 3"),
        ("rotate", -1, r"params\['rotate'\] has values \[-1  ?0\]; expected 0 to 3"),
        ("flip", 4, r"params\['flip'\] has values \[0 4\]; expected 0 to 3"),
        ("flip", -1, r"params\['flip'\] has values \[-1  ?0\]; expected 0 to 3"),
        ("crop", 2, r"params\['crop'\] has values \[0 2\]; expected 0 to 1"),
        ("crop", -1, r"params\['crop'\] has values"),
        ("noise_mode", 4, r"params\['noise_mode'\] has values \[0 4\]; expected 0 to 3"),
        ("noise_mode", -1, r"params\['noise_mode'\] has values"),
    ],
)
def test_unusable_tables_are_refused_by_field(field, value, message):
    params = identity_params(2)
    params[field][1] = value
    with pytest.raises(InputError, match=message):
        augment(**good(params=params))


@pytest.mark.parametrize("field", ["crop_height", "crop_width"])
@pytest.mark.parametrize("value", [0, -3, 65])
def test_regions_of_no_size_or_far_too_large_are_refused(field, value):
    params = identity_params(2)
    params["crop"][1], params["crop_height"], params["crop_width"] = 1, 16, 16
    augment(**good(params=params))
    params[field][1] = value
    with pytest.raises(InputError, match=rf"params\['{field}'\] is {value}\.\.{value}; expected 1 to 4 sides"):
        augment(**good(params=params))
    params[field][1] = 64
    augment(**good(params=params))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise_mode": 1, "noise_std": np.nan}, r"params\['noise_std'\] holds NaN or infinity; expected grey levels"),
        ({"noise_mode": 3, "shift": np.inf}, r"params\['shift'\] holds NaN or infinity"),
        ({"shift": np.nan}, r"params\['shift'\] holds NaN or infinity"),
        ({"noise_mode": 2, "noise_std": -2e8}, r"params\['noise_std'\] has values up to 2e\+08; expected grey levels"),
        ({"crop": 1, "crop_height": 9, "crop_width": 9, "crop_top": 65}, r"params\['crop_top'\] is 0\.\.65; expected"),
        (
            {"crop": 1, "crop_height": 9, "crop_width": 9, "crop_left": -(2**31)},
            r"params\['crop_left'\] is -2147483648",
        ),
    ],
)
def test_tables_that_no_pixel_could_follow_are_refused(fields, message):
    params = identity_params(2)
    for name, value in fields.items():
        params[name] = [0, value] if name in ("crop_top", "crop_left") else value
    with pytest.raises(InputError, match=message):
        augment(**good(params=params))


@pytest.mark.parametrize("turns", [1, 3])
def test_quarter_turns_of_oblong_slices_are_refused(turns):
    image = np.zeros((2, 3, 16, 20), np.uint8)
    params = identity_params(2)
    params["rotate"][0] = turns
    message = r"params\['rotate'\] asks for a quarter turn of 16x20 slices; expected square ones"
    with pytest.raises(InputError, match=message):
        augment(**good(image=image, params=params))
    params["rotate"][0] = 2
    augment(**good(image=image, params=params))


@pytest.mark.parametrize("labels", ["prompts", "instances", "classes", "foreground"])
def test_an_empty_batch_gives_an_empty_batch(labels):
    batch = augment(IMAGE[:0], MASK[:0], identity_params(0), class_ids=np.zeros((0, 4), int), labels=labels)
    assert batch.image.shape == (0, 3, 16, 16)
    assert batch.labels.shape == ((0, 4, 16, 16) if labels in ("prompts", "instances") else (0, 16, 16))


def test_a_refusal_leaves_the_arguments_as_they_were():
    arguments = good()
    copies = {name: np.array(value).copy() for name, value in arguments.items()}
    with pytest.raises(InputError):
        augment(**arguments, labels="boxes")
    for name, value in copies.items():
        np.testing.assert_array_equal(np.array(arguments[name]), value)


def test_images_without_a_label_plane_each_are_refused():
    spec = LabelSpec(np.ones((2, 1), np.int32), np.zeros(2, np.int32), True)
    tables = resampling_tables(((16, 16),))
    with pytest.raises(InputError, match="there are 2 images and 1 label planes; expected one for each"):
        finish_batch(
            IMAGE, np.zeros(16, np.uint8), np.zeros(1, np.int64), np.zeros(1, PLANE_DTYPE), tables, identity_params(2),
            spec, OutputTypes(),
        )  # fmt: skip
