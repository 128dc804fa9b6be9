"""Which image goes with which labels, what their classes are called, and what a proposal of prompts is made of."""

from __future__ import annotations

import json
import time

import pytest

from gpuparse import pairs
from gpuparse.errors import InputError
from gpuparse.foreign import ForeignFormat, find_cases, find_folders
from gpuparse.pairs import FolderLayout, find_pairs, read_dataset_json
from gpuparse.prompts import parse_class_prompts
from gpuparse.proposal import class_names, propose_prompts, write_proposal

NNUNET = FolderLayout("nnunet")


@pytest.fixture
def folder(tmp_path):
    """A function that makes empty files; finding pairs opens none."""

    def make(*names, **dataset_json):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        if dataset_json:
            (tmp_path / "dataset.json").write_text(json.dumps(dataset_json))
        return tmp_path

    return make


def short(pairs, folder):
    """(name, image, labels) relative to the folder; problems as True."""

    def relative(path):
        return None if path is None else path.relative_to(folder).as_posix()

    return [(p.name, relative(p.image), relative(p.labels), p.problem is not None) for p in pairs]


def test_nnunet_pairs_by_name_without_the_channel(folder):
    root = folder(
        "imagesTr/la_004_0000.nii.gz", "imagesTr/la_003_0000.nii.gz", "labelsTr/la_003.nii.gz",
        "labelsTr/la_004.nii.gz", "imagesTs/la_001_0000.nii.gz", "imagesTr/._la_003_0000.nii.gz", "imagesTr/notes.txt",
    )  # fmt: skip
    assert short(find_pairs(root, NNUNET), root) == [
        ("la_003", "imagesTr/la_003_0000.nii.gz", "labelsTr/la_003.nii.gz", False),
        ("la_004", "imagesTr/la_004_0000.nii.gz", "labelsTr/la_004.nii.gz", False),
    ]
    assert short(find_pairs(root, NNUNET, "test"), root) == [("la_001", "imagesTs/la_001_0000.nii.gz", None, True)]


def test_the_decathlon_has_no_channel_suffix(folder):
    root = folder("imagesTr/liver_0001.nii.gz", "imagesTr/liver_0002.nii.gz", "labelsTr/liver_0001.nii.gz")
    pairs = find_pairs(root, NNUNET)
    assert [(p.name, p.labels is not None) for p in pairs] == [("liver_0001", True), ("liver_0002", False)]
    assert "liver_0002.nii.gz: no labels for it, expected " in pairs[1].problem


def test_several_channels_want_a_choice(folder):
    names = [f"imagesTr/b_{case}_{channel:04d}.nii.gz" for case in "ab" for channel in (0, 3)]
    root = folder(*names, "labelsTr/b_a.nii.gz", "labelsTr/b_b.nii.gz", channel_names={"0": "T1", "3": "FLAIR"})
    with pytest.raises(InputError, match=r"several channels: 0 \(T1\), 3 \(FLAIR\)\. Choose one with --channel"):
        find_pairs(root, NNUNET)
    assert [p.image.name for p in find_pairs(root, FolderLayout("nnunet", channel=3))] == names_of(names, 3)
    for channels, told in ((None, "3"), (["T1"], "3"), ({"3": "FLAIR"}, r"3 \(FLAIR\)")):
        (root / "dataset.json").write_text(json.dumps({"channel_names": channels}))
        with pytest.raises(InputError, match=rf"several channels: 0, {told}\. Choose one"):
            find_pairs(root, NNUNET)
    with pytest.raises(InputError, match=r"no channel 1; it has 0, 3"):
        find_pairs(root, FolderLayout("nnunet", channel=1))
    (root / names[3]).unlink()
    missing = find_pairs(root, FolderLayout("nnunet", channel=3))[1]
    assert "b_b_0000.nii.gz: its case has no file of channel 3" in missing.problem


def names_of(names, channel):
    return [name.removeprefix("imagesTr/") for name in names if f"_{channel:04d}." in name]


def test_labels_without_an_image_are_not_passed_over(folder):
    root = folder("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    pairs = find_pairs(root, NNUNET)
    assert "labelsTr/b.nii.gz: labels without an image in" in pairs[1].problem


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        ("images/*.nii.gz", "masks/*.nii.gz", ["p1", "p2"]),
        ("scans/*/t1.nii", "scans/*/seg.nii", ["p1", "p2"]),
        ("brats/*/*-t1c.nii.gz", "brats/*/*-seg.nii.gz", ["p1", "p2"]),
        ("mixed/*_ct.nii", "mixed/*_seg.nii", ["p1", "p2"]),
        ("sites/*/im/*.nii", "sites/*/gt/*.nii", ["A_p1", "B_p1"]),
    ],
)
def test_globs_pair_by_what_their_stars_stand_for(folder, images, labels, names):
    root = folder(*[
        name
        for case in ("p1", "p2")
        for name in (
            f"images/{case}.nii.gz", f"masks/{case}.nii.gz", f"scans/{case}/t1.nii", f"scans/{case}/seg.nii",
            f"brats/{case}/{case}-t1c.nii.gz", f"brats/{case}/{case}-seg.nii.gz", f"mixed/{case}_ct.nii",
            f"mixed/{case}_seg.nii", f"sites/{'A' if case == 'p1' else 'B'}/im/p1.nii",
            f"sites/{'A' if case == 'p1' else 'B'}/gt/p1.nii",
        )
    ])  # fmt: skip
    pairs = find_pairs(root, FolderLayout("nifti", images, labels))
    assert [p.name for p in pairs] == names
    assert all(p.problem is None and p.image != p.labels for p in pairs)


def test_an_image_glob_may_match_the_labels_too(folder):
    root = folder("a.nii", "a_seg.nii", "b.nii")
    pairs = find_pairs(root, FolderLayout("nifti", "*.nii", "*_seg.nii"))
    # What the labels' glob matches is labels; b has none, and the report says so.
    assert [p.problem for p in pairs if p.image == root / "b.nii"] == [
        f"{root}/b.nii: no labels for it, expected {root}/b_seg.nii. Add them, or leave the image out."
    ]
    assert [(p.name, p.problem is None) for p in pairs] == [("a", True), ("b", False)]


def test_many_files_are_paired_in_proportion_to_their_number(tmp_path):
    names = [f"{number:05}" for number in range(20_000)]
    images, labels = ({name: tmp_path / folder / name for name in names} for folder in ("images", "masks"))
    start = time.perf_counter()
    matches = (pairs._Matches(by_name, {}) for by_name in (images, labels))
    found = pairs._paired(tmp_path, "images/*", next(matches), next(matches), "masks/*")
    assert time.perf_counter() - start < 10  # a set of all labels for each image took longer than a minute
    assert [(p.name, p.image, p.labels) for p in found] == [(name, images[name], labels[name]) for name in names]


def test_a_star_may_stand_for_nothing_beside_another(folder):
    root = folder("im/a.nii", "im/a_2.nii", "im/b.nii.gz", "gt/a.nii", "gt/a_2.nii", "gt/b.nii.gz")
    pairs = find_pairs(root, FolderLayout("nifti", "im/*.nii*", "gt/*.nii*"))
    assert [(p.name, p.problem) for p in pairs] == [("a", None), ("a_2", None), ("b_.gz", None)]


def test_one_image_in_two_files_is_refused(folder):
    root = folder("imagesTr/a_0000.nii", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(InputError, match=r"a_0000\.nii and .*a_0000\.nii\.gz would both be 'a_0000'\. Keep one"):
        find_pairs(root, NNUNET)
    root = folder("second/imagesTr/a.nii", "second/labelsTr/a.nii", "second/labelsTr/a.nii.gz") / "second"
    with pytest.raises(InputError, match=r"labelsTr/a\.nii and .*a\.nii\.gz would both be 'a'\. Keep one of them"):
        find_pairs(root, NNUNET)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ("images/*.nii", None, "needs both globs"),
        ("images/*.nii", "m*/p*.nii", r"different numbers of '\*'"),
        ("images/x.nii", "masks/x.nii", r"at least one '\*'"),
        ("images/[ab]*.nii", "masks/*.nii", "no other wildcard"),
        ("**/*.nii", "masks/*.nii", "no other wildcard"),
        ("../*.nii", "masks/*.nii", "a path below the dataset's folder"),
        ("/images/*.nii", "masks/*.nii", "a path below the dataset's folder"),
        ("absent/*.nii", "masks/*.nii", "nothing in it matches 'absent"),
        ("i*/*.nii", "m*/*.nii", "i1_2/1.nii would both be case '1_2_1'"),
        ("images/*.nii", "images/*.nii", "so it is labels"),
        ("images/p1*.nii", "masks/p1*.nii", r"matches .*images/p1\.nii with nothing for '\*'.* rename the file"),
    ],
)
def test_globs_that_cannot_pair_are_refused(folder, images, labels, message):
    root = folder("images/p1.nii", "masks/p1.nii", "i1/2.nii", "i1_2/1.nii", "i1/2_1.nii")
    with pytest.raises(InputError, match=message):
        find_pairs(root, FolderLayout("nifti", images, labels))


def test_folders_that_hold_nothing_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="absent: no such folder"):
        find_pairs(tmp_path / "absent", NNUNET)
    with pytest.raises(InputError, match="absent: no such folder"):
        find_folders(tmp_path / "absent", ForeignFormat(NNUNET))
    with pytest.raises(InputError, match="split is 'val'; an nnU-Net folder has 'train'"):
        find_pairs(tmp_path, NNUNET, "val")
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(InputError, match=r"imagesTr: no \.nii or \.nii\.gz files"):
        find_pairs(tmp_path, NNUNET)
    with pytest.raises(InputError, match="Expected a folder of DICOM files for each case"):
        find_pairs(tmp_path / "imagesTr", FolderLayout("dicom"))


def test_a_store_beside_its_sources_is_no_case(folder):
    root = folder("p1/1.dcm", "train.zarr/zarr.json", ".train.zarr.partial/x")
    assert [p.name for p in find_pairs(root, FolderLayout("dicom"))] == ["p1"]


def test_a_folder_is_a_dataset_or_holds_some(folder):
    root = folder("Dataset001_A/imagesTr/a_0000.nii.gz", "Dataset002_B/imagesTr/b_0000.nii.gz", "other/x")
    assert list(find_folders(root, ForeignFormat(NNUNET))) == ["Dataset001_A", "Dataset002_B"]
    assert list(find_folders(root / "Dataset001_A", ForeignFormat(NNUNET))) == ["Dataset001_A"]
    assert find_folders(root / "other", ForeignFormat(NNUNET)) == {}


@pytest.mark.parametrize(
    ("channels", "window", "expected"),
    [
        ({"channel_names": {"0": "CT"}}, "abdomen", [-160.0, 240.0]),
        ({"channel_names": {"0": "T2"}}, None, "percentile"),
        ({"modality": {"0": "MRI"}}, None, "percentile"),
        ({"modality": {"0": "MRI"}}, "10,5", [0.0, 10.0]),
        ({"channel_names": {"0": "T1", "1": "CT"}}, None, "percentile"),
        ({"channel_names": {"0": "CT"}}, None, None),
        ({"channel_names": ["CT"]}, None, None),
        ({}, None, None),
    ],
)
def test_a_window_is_chosen_only_where_it_is_certain(folder, channels, window, expected):
    root = folder("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", labels={"liver": 1}, **channels)
    wanted = ForeignFormat(NNUNET, window)
    if expected is None:
        with pytest.raises(InputError, match=r"and no window given. Add --window with abdomen, lung, brain, bone"):
            find_cases(root, wanted)
    else:
        (case,) = find_cases(root, wanted).cases
        assert case.reader.settings["window"] == expected


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"background": 0, "liver": 1, "spleen": 2}, {1: "liver", 2: "spleen"}),
        ({"0": "background", "2": "spleen", "1": "liver"}, {1: "liver", 2: "spleen"}),
        ({"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3], "enhancing": 3},
         {1: "whole tumor other than core", 2: "core other than enhancing", 3: "enhancing"}),
        ({"wall": [1, 2, 3], "inner": [2], "outer": [3], "cyst": [5], "both": [6, 7]},
         {1: "wall other than inner and outer", 2: "inner", 3: "outer", 5: "cyst", 6: "part 6 of both",
          7: "part 7 of both"}),
        ({"a": [1, 2], "b": [2, 3], "Ignore": 4}, {1: "part 1 of a", 2: "part 2 of a", 3: "part 3 of b"}),
        ({"0": "background", "1": "kidney", "2": "kidney"}, {1: "kidney", 2: "kidney"}),
        ({"background": 0, "kidney": 1, "ignore": 2}, {1: "kidney"}),
        ({}, {}),
    ],
)  # fmt: skip
def test_class_names_of_nnunet(labels, names):
    assert class_names({"labels": labels}, "dataset.json") == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["liver"], "labels is list"),
        ({"liver": "one", "x": None}, "label .* expected whole numbers"),
        ({"liver": 1.5}, r"label 'liver' has id 1\.5; expected whole numbers"),
        ({"liver": [1, float("inf")]}, r"label 'liver' has id \[1, inf\]; expected whole numbers"),
        ({"liver": float("nan")}, "label 'liver' has id nan"),
        ({"liver": True}, "label 'liver' has id True"),
    ],
)
def test_class_names_that_are_none_are_refused(labels, message):
    with pytest.raises(InputError, match=rf"dataset\.json: {message}"):
        class_names({"labels": labels}, "dataset.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        ("[]", "holds list; expected an object"),
    ],
)
def test_a_broken_dataset_json_is_named(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=rf"dataset\.json: {message}"):
        read_dataset_json(tmp_path)


def test_a_byte_order_mark_in_dataset_json_is_passed_over(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": {"liver": 1}}', encoding="utf-8-sig")
    assert read_dataset_json(tmp_path) == {"labels": {"liver": 1}}


@pytest.mark.parametrize("modality", [None, "CT", "MR", "T1_contrast"])
def test_a_proposal_is_a_valid_entry(modality):
    entry = propose_prompts({2: "left_kidney [SEP] x", 1: "liver", 7: " "}, modality)
    assert parse_class_prompts(entry, "proposal").class_ids == (1, 2, 7)
    assert entry["1"][0] == {None: "liver", "CT": "liver in CT", "MR": "liver in MRI"}.get(
        modality, "liver in T1 contrast"
    )


def test_a_proposal_that_cannot_be_written_is_in_the_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"(?s)cannot be written.*Save this as class_prompts\.json.*liver"):
        write_proposal(tmp_path / "file", {"A": propose_prompts({1: "liver"})})
    (tmp_path / "class_prompts.proposed.json").mkdir()
    with pytest.raises(InputError, match=r"class_prompts\.proposed\.json: cannot be written"):
        write_proposal(tmp_path, {"A": propose_prompts({1: "liver"})})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class_prompts.proposed.json", "file"]
