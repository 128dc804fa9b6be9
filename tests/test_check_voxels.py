"""`check` on voxels, prompts and whole datasets: each defect is put into a good volume, alone."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from checking import codes, found, good_image, good_labels
from scipy import ndimage

import gpuparse
from gpuparse.check.pieces import scattered_ids

SHAPE = (6, 24, 20)


@pytest.fixture
def check_one(write_case, data_dir, tmp_path):
    """Writes one case; returns the report of its folder, after comparing it with that of the store made from it."""

    def run(imgs=None, gts=None, *, check=None, **arguments):
        write_case(good_image() if imgs is None else imgs, good_labels() if gts is None else gts, **arguments)
        report = gpuparse.check(data_dir, **(check or {}))
        if not report.count("error"):
            stores = [dataset.store_path for dataset in gpuparse.convert(data_dir, out_dir=tmp_path / "out").datasets]
            of_store = gpuparse.check(stores, **(check or {}))
            assert [(f.code, f.found) for f in of_store.findings] == [(f.code, f.found) for f in report.findings]
        return report

    return run


# Images


def test_a_blank_image(check_one):
    report = check_one(np.full(SHAPE, 9, np.uint8))
    assert codes(report) == ["GP301"]
    assert found(report, "GP301") == "every voxel is 9."


@pytest.mark.parametrize(("span", "expected"), [(15, ["GP302"]), (16, [])])
def test_few_grey_levels(check_one, span, expected):
    assert codes(check_one((good_image() % (span + 1)).astype(np.uint8))) == expected


def test_blank_slices_between_others(check_one):
    image = good_image()
    image[[0, 2, 3, 5]] = 7  # those at the ends are padding
    report = check_one(image)
    assert codes(report) == ["GP308"]
    assert found(report, "GP308") == "axis 0: 2 slices (2, 3) of 6 hold one value each."


def test_identical_neighbours(check_one):
    image = good_image()
    image[3] = image[2]
    image[5] = image[4]
    report = check_one(image)
    assert codes(report) == ["GP310"]
    assert found(report, "GP310") == "axis 0: 2 slices (3, 5) equal the one before."


def test_all_axes_of_an_isotropic_volume_are_looked_at(check_one):
    image = good_image((12, 12, 12))
    image[:, :, 4] = image[:, :, 5] = image[:, :, 6]
    image[:, 7] = 0
    report = check_one(image, good_labels((12, 12, 12)), spacing=(1, 1, 1))
    assert codes(report) == ["GP308", "GP310"]
    assert found(report, "GP308").startswith("axis 1: slice 7 of 12")
    assert found(report, "GP310").startswith("axis 2: 2 slices (5, 6)")


def test_a_single_slice_has_no_neighbours(check_one):
    labels = np.zeros((1, 24, 20), np.uint8)
    labels[0, 3:9, 3:9] = 1
    assert codes(check_one(good_image((1, 24, 20)), labels)) == ["GP309"]


# Geometry


@pytest.mark.parametrize(
    ("shape", "spacing", "suspicious"),
    [
        ((8, 40, 40), (5.0, 0.8, 0.8), True),  # written z, y, x
        ((8, 40, 40), (0.8, 0.8, 5.0), False),
        ((40, 40, 8), (5.0, 0.8, 0.8), False),  # thick slices along x: a sagittal series
        ((8, 40, 40), (1.0, 1.0, 1.0), False),
        ((80, 40, 40), (0.4, 0.8, 0.8), True),
        ((8, 40, 40), (0.7, 0.8, 5.0), False),
    ],
)
def test_spacing_in_the_wrong_order(check_one, shape, spacing, suspicious):
    report = check_one(good_image(shape), good_labels(shape), spacing=spacing)
    assert codes(report) == ["GP311"] * suspicious


def test_a_colour_image_taken_for_a_volume(check_one):
    labels = np.zeros((32, 30, 3), np.uint8)
    labels[5:9, 5:9] = 1
    report = check_one(good_image((32, 30, 3)), labels, spacing=(1, 1, 1))
    assert codes(report) == ["GP312"]


# Labels


def test_no_foreground_and_a_class_never_present(check_one):
    report = check_one(gts=np.zeros(SHAPE, np.uint8))
    assert codes(report) == ["GP303", "GP501"]
    assert found(report, "GP501") == "class 1 ('structure 1') in none of 1 readable cases."


def test_foreground_coded_255(check_one):
    assert codes(check_one(gts=good_labels() * 255, prompts={"1": ["one"]})) == ["GP304", "GP408", "GP501"]


def test_foreground_coded_255_with_a_prompt_for_255(check_one, write_case, data_dir):
    write_case(good_image(), good_labels(), name="other", prompts={"1": ["one"], "255": ["two"]})
    report = check_one(good_image(seed=1), good_labels() * 255, name="coded")
    assert [(f.code, f.case) for f in report.findings] == [("GP304", "coded")]


def test_slices_that_the_reference_blanks(check_one):
    labels = good_labels()
    labels[3] *= 255
    report = check_one(gts=labels)
    assert codes(report) == ["GP305"]
    assert found(report, "GP305") == "1 along axis 0; recipe='reference' blanks them."


def test_ids_without_prompts(check_one):
    labels = good_labels()
    labels[2, :4, :3] = np.arange(2, 14).reshape(4, 3)
    report = check_one(gts=labels, prompts={"1": ["one"], "5": ["five"]})
    assert codes(report) == ["GP408"]
    assert found(report, "GP408") == "id 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, ...; prompts are there for 1, 5."


def cells(num_cells: int, spacing: int = 4) -> np.ndarray:
    """Cubes of 2x2x2 voxels on a grid, numbered from 1."""
    side = int(np.ceil(num_cells ** (1 / 3)))
    labels = np.zeros((side * spacing,) * 3, np.uint16)
    for number in range(num_cells):
        z, y, x = (spacing * int(i) for i in np.unravel_index(number, (side,) * 3))
        labels[z : z + 2, y : y + 2, x : x + 2] = number + 1
    return labels


def test_instance_ids_that_have_wrapped(check_one):
    labels = cells(300)
    arguments = {"instance_label": 1, "spacing": (1, 1, 1)}
    assert codes(check_one(good_image(labels.shape), labels, **arguments)) == []
    report = check_one(good_image(labels.shape), labels.astype(np.uint8), **arguments)
    assert codes(report) == ["GP306"]
    assert found(report, "GP306").startswith("the ids fill 1..255, the range of 8 bits, and 44 ids lie in pieces")


def test_one_id_on_distant_objects(check_one):
    labels = cells(27)
    labels[labels == 20] = 3
    report = check_one(good_image(labels.shape), labels, instance_label=1, spacing=(1, 1, 1))
    assert codes(report) == ["GP307"]
    assert "1 ids" in found(report, "GP307")
    assert "id 3 in 2 pieces" in found(report, "GP307")


def test_pieces_count_only_where_they_are_large_and_far():
    labels = np.zeros((20, 40, 40), np.uint8)
    labels[2:6, 2:6, 2:6] = 1
    labels[10, 30, 30] = 1  # a speck
    labels[2:6, 2:6, 8:12] = 1  # near: the gap is shorter than the object
    assert scattered_ids(labels, (1, 1, 1)) == {}
    labels[2:6, 2:6, 30:34] = 1
    assert scattered_ids(labels, (1, 1, 1)) == {1: 2}
    labels.setflags(write=False)
    assert scattered_ids(labels, (1, 1, 1)) == {1: 2}
    assert scattered_ids(labels, (10, 1, 1)) == {}  # 40 mm long along z, and nothing lies 40 mm away
    labels = labels.copy()
    labels[15:19, 30:34, 2:6] = 2
    assert scattered_ids(labels, (1, 1, 1)) == {1: 2}
    assert scattered_ids(np.zeros((2, 2, 2), np.uint8), (1, 1, 1)) == {}


def scattered_by_scipy(labels: np.ndarray) -> dict[int, int]:
    """The same rule, one id at a time."""
    scattered = {}
    for number in np.unique(labels[labels > 0]).tolist():
        pieces, _ = ndimage.label(labels == number, np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel())[1:]
        boxes = ndimage.find_objects(pieces)
        largest = int(np.argmax(sizes))
        longest = max(s.stop - s.start for s in boxes[largest])
        num_far = 0
        for size, box in zip(sizes, boxes, strict=True):
            gap = max(max(a.start - b.stop, b.start - a.stop) for a, b in zip(box, boxes[largest], strict=True))
            num_far += size >= max(4, 0.1 * sizes[largest]) and gap > longest
        if num_far:
            scattered[number] = int(num_far) + 1
    return scattered


@hypothesis.given(
    st.lists(st.tuples(*[st.integers(0, 27)] * 3, st.integers(1, 3), *[st.integers(1, 4)] * 3), min_size=1, max_size=12)
)
def test_pieces_agree_with_scipy(boxes):
    labels = np.zeros((28, 28, 28), np.uint16)
    for z, y, x, number, depth, height, width in boxes:
        labels[z : z + depth, y : y + height, x : x + width] = number
    # Of two largest pieces either may be taken as the first, so only clear cases are compared.
    for number in np.unique(labels[labels > 0]).tolist():
        sizes = np.sort(np.bincount(ndimage.label(labels == number, np.ones((3, 3, 3)))[0].ravel())[1:])
        hypothesis.assume(len(sizes) < 2 or sizes[-1] > sizes[-2])
    assert scattered_ids(labels, (1, 1, 1)) == scattered_by_scipy(labels)


# Prompts


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, "GP401", "not found"),
        ("{", "GP401", "not valid JSON"),
        ("[" * 100_000, "GP401", ""),
        ('{"OTHER": {"1": "x", "instance_label": 0}}', "GP402", "no entry 'DATA'; it has OTHER"),
        ('{"DATA": {"1": "x"}}', "GP403", "no 'instance_label'"),
        ('{"DATA": {"one": "x", "instance_label": 0}}', "GP403", "key 'one' is no class id"),
        ('{"DATA": {"1": [""], "instance_label": 0}}', "GP403", "is empty or no text"),
        ('{"DATA": {"1": {"2": 3}, "instance_label": 0}}', "GP403", "expected a prompt"),
        ('{"DATA": {"1": ["a[SEP]b", "c"], "instance_label": 0}}', "GP404", "class 1: 'a[SEP]b'"),
        ('{"DATA": {"1": "[SEP]", "instance_label": 0}}', "GP404", "class 1: '[SEP]'"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used(check_one, write_case, data_dir, content, code, says):
    write_case(good_image(), good_labels())
    prompts_path = data_dir / "class_prompts.json"
    prompts_path.unlink()
    if content is not None:
        prompts_path.write_text(content)
    report = gpuparse.check(data_dir)
    assert codes(report) == [code]
    assert says in found(report, code)


def test_separators_do_not_hide_other_findings(check_one):
    report = check_one(gts=good_labels() * 2, prompts={"1": ["a [SEP] b"], "3": ["left [SEP]"]})
    assert codes(report) == ["GP404", "GP404", "GP406", "GP408", "GP501"]


def test_two_classes_with_one_prompt(check_one):
    labels = good_labels()
    labels[2, 2, 2] = 2
    report = check_one(gts=labels, prompts={"1": ["Liver in CT"], "2": ["a tumour", "liver  in ct"]})
    assert codes(report) == ["GP405"]
    assert found(report, "GP405") == "classes 1 and 2: 'liver  in ct'."


def test_prompts_that_name_a_side(check_one):
    assert codes(check_one(prompts={"1": ["left kidney"]})) == ["GP406"]
    assert codes(check_one(prompts={"1": ["left kidney"]}, check={"mirroring": True})) == ["GP407"]


# Datasets


def test_classes_present_somewhere_are_not_missed(write_case, data_dir):
    prompts = {str(n): [f"structure {n}"] for n in range(1, 10)}
    write_case(good_image(), good_labels(), name="a", prompts=prompts)
    write_case(good_image(seed=1), good_labels() * 2, name="b")
    write_case(good_image(seed=2), name="c").write_bytes(b"")
    report = gpuparse.check(data_dir)
    assert codes(report) == ["GP101", "GP501"]
    assert found(report, "GP501") == (
        "class 3 ('structure 3'), 4 ('structure 4'), 5 ('structure 5'), 6 ('structure 6'), 7 ('structure 7'), ... "
        "in none of 2 readable cases (1 more cannot be read)."
    )


def test_the_same_image_twice(write_case, data_dir):
    write_case(good_image(), good_labels(), name="a")
    write_case(good_image(), good_labels(), name="b", text="other bytes, same voxels")
    write_case(good_image(), good_labels()[::-1] * 2, name="c", dataset="OTHER")
    write_case(good_image().reshape(6, 20, 24), np.ones((6, 20, 24), np.uint8), name="d")
    write_case(np.zeros(SHAPE, np.uint8), good_labels(), name="blank1")
    write_case(np.zeros(SHAPE, np.uint8), good_labels(), name="blank2")
    report = gpuparse.check(data_dir, ignore=["GP301", "GP501"])
    assert [(f.code, f.case) for f in report.findings] == [("GP502", "b"), ("GP502", "c")]
    assert report.findings[0].found.endswith("DATA/train/a.npz, with the same labels.")
    assert report.findings[1].found.endswith("DATA/train/a.npz, with other labels.")


def test_the_same_image_in_training_and_validation(write_case, data_dir, tmp_path):
    write_case(good_image(), good_labels(), name="a")
    write_case(good_image(), good_labels(), name="b", split="val")
    assert codes(gpuparse.check(data_dir)) == []
    report = gpuparse.check(data_dir, splits=["train", "val"])
    assert codes(report) == ["GP503"]
    assert found(report, "GP503").endswith("with the same labels; one is for training, the other for validation.")


def test_a_leak_inside_a_store(write_case, data_dir, tmp_path):
    from gpuparse.splits import ValSplit

    for number, name in enumerate("abcd"):
        write_case(good_image(seed=number // 2), good_labels(), name=name)
    split_file = tmp_path / "split.json"
    split_file.write_text('{"train": ["a", "b", "c"], "val": ["d"]}')
    (dataset,) = gpuparse.convert(data_dir, out_dir=tmp_path / "out", val_split=ValSplit(file=split_file)).datasets
    report = gpuparse.check(dataset.store_path)
    assert [(f.code, f.case) for f in report.findings] == [("GP503", "d"), ("GP502", "b")]
    # The files of the same store are the same images, and no finding.
    assert codes(gpuparse.check([data_dir, dataset.store_path])) == ["GP502", "GP502", "GP502", "GP503"]
