"""class_prompts.json: what is read from it and what is refused."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuparse.errors import GpuparseError, InputError
from gpuparse.prompts import ClassPrompts, load_class_prompts, parse_class_prompts

PROMPT = st.text(min_size=1).filter(lambda text: text.strip() and "[SEP]" not in text)


def test_classes_keep_the_order_of_the_file_and_single_prompts_become_lists():
    entry = {"10": "liver", "2": ["spleen", "CT of the spleen"], "instance_label": 0, "1": ("aorta",)}
    prompts = parse_class_prompts(entry, "here")
    assert list(prompts.classes.items()) == [(10, ("liver",)), (2, ("spleen", "CT of the spleen")), (1, ("aorta",))]
    assert prompts.class_ids == (10, 2, 1)
    assert prompts.instance_label == 0


def test_content_as_yaml_has_it_is_taken_as_that_of_the_file():
    omegaconf = pytest.importorskip("omegaconf")
    expected = ClassPrompts({2: ("liver", "the liver"), 1: ("spleen",), 10: ("aorta",)}, 0)
    text = "{2: [liver, the liver], '1': spleen, 10: aorta, instance_label: 0}"
    assert parse_class_prompts(omegaconf.OmegaConf.create(text), "here") == expected
    entry = {2: ["liver", "the liver"], "1": "spleen", 10: "aorta", "instance_label": 0}
    assert parse_class_prompts(entry, "here") == expected


@given(
    classes=st.dictionaries(
        st.integers(1, 2**31 - 1), st.lists(PROMPT, min_size=1, max_size=3), min_size=1, max_size=4
    ),
    instance_label=st.sampled_from([0, 1]),
)
def test_the_json_form_reads_back_as_it_was(classes, instance_label):
    prompts = ClassPrompts({k: tuple(v) for k, v in classes.items()}, instance_label)
    again = parse_class_prompts(json.loads(json.dumps(prompts.to_json())), "here")
    assert again == prompts
    assert again.class_ids == prompts.class_ids  # in the same order


def test_every_entry_of_a_real_file_is_usable(volumes_dir):
    raw = json.loads((volumes_dir / "class_prompts.json").read_text(encoding="utf-8"))
    entries = load_class_prompts(volumes_dir / "class_prompts.json")
    assert entries == raw
    for name, entry in entries.items():
        prompts = parse_class_prompts(entry, name)
        assert prompts.to_json() == raw[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"A": ', r"class_prompts\.json: not valid JSON: .*line 1 column 7.*Mend it with any JSON editor"),
        ("", r"class_prompts\.json: not valid JSON: Expecting value"),
        (b"\xff\xfe{}", r"class_prompts\.json: not valid JSON: .*utf-8"),
        ("[]", r"class_prompts\.json: expected an object with one entry per dataset"),
        ('{"A": "liver"}', r"expected an object with one entry per dataset; for each dataset expected \{\"<class id>"),
        ('{"A": {"1": "x", "1": "y", "instance_label": 0}}', r"not valid JSON: key '1' stands twice in one object"),
        ('{"A": ' + "1" * 5000 + "}", r"not valid JSON: Exceeds the limit"),
        ("[" * 100_000, r"not valid JSON: maximum recursion depth exceeded"),
        ('{"A": {}, "A": {}}', r"not valid JSON: key 'A' stands twice"),
    ],
)
def test_files_that_are_no_prompt_file_are_refused(tmp_path, text, message):
    path = tmp_path / "class_prompts.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        load_class_prompts(path)


def test_many_classes_are_read_in_time_in_proportion_to_their_number(tmp_path):
    path = tmp_path / "class_prompts.json"
    entry = {**{str(i): [f"part {i}"] for i in range(1, 100_001)}, "instance_label": 0}
    path.write_text(json.dumps({"A": entry}))
    started = time.perf_counter()
    prompts = load_class_prompts(path)["A"]
    assert time.perf_counter() - started < 20  # a look at all keys for each of them takes minutes
    assert parse_class_prompts(prompts, "A").class_ids == tuple(range(1, 100_001))


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "class_prompts.json"
    path.write_text('{"A": {"1": "die Füße", "instance_label": 0}}', encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf{")
    assert load_class_prompts(path) == {"A": {"1": "die Füße", "instance_label": 0}}


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_missing_file_is_named_with_its_layout(tmp_path, make):
    path = tmp_path / "class_prompts.json"
    make(path)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: not found\..*\"instance_label\": 0 or 1"):
        load_class_prompts(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["liver"], r"file, dataset 'A': got list; expected \{"),
        ({"1": "liver"}, r"file, dataset 'A': no 'instance_label'\. Add 0 \(ids are classes\) or 1"),
        ({"1": "liver", "instance_label": 2}, r"instance_label is 2; expected 0 or 1"),
        ({"1": "liver", "instance_label": "1"}, r"instance_label is '1'; expected 0 or 1"),
        ({"1": "liver", "instance_label": None}, r"instance_label is None; expected 0 or 1"),
        ({"0": "background", "instance_label": 0}, r"key '0' is no class id; expected '1', '2', \.\.\. \(0 is backgr"),
        ({"-1": "x", "instance_label": 0}, r"key '-1' is no class id"),
        ({"01": "x", "instance_label": 0}, r"key '01' is no class id"),
        ({"1.0": "x", "instance_label": 0}, r"key '1\.0' is no class id"),
        ({"٣": "x", "instance_label": 0}, r"key '٣' is no class id"),  # int() would take it for 3
        ({"²": "x", "instance_label": 0}, r"key '²' is no class id"),  # a digit to str, none to int()
        ({"liver": "x", "instance_label": 0}, r"key 'liver' is no class id"),
        ({0: "background", "instance_label": 0}, r"key 0 is no class id"),
        ({-1: "x", "instance_label": 0}, r"key -1 is no class id"),
        ({1.0: "x", "instance_label": 0}, r"key 1\.0 is no class id"),
        ({True: "x", "instance_label": 0}, r"key True is no class id"),
        ({None: "x", "instance_label": 0}, r"key None is no class id"),
        ({2**31: "x", "instance_label": 0}, r"class id 2147483648 is too large"),
        ({1: "x", "1": "y", "instance_label": 0}, r"class id 1 stands there twice, as a number and as text\. Keep one"),
        ({"1": {"a": "b"}, "instance_label": 0}, r"class 1: got \{'a': 'b'\}; expected a prompt or a non-empty list"),
        ({"2147483648": "x", "instance_label": 0}, r"class id 2147483648 is too large; expected at most 2147483647"),
        ({"9" * 5000: "x", "instance_label": 0}, r"class id 9+ is too large; expected at most 2147483647"),
        ({"instance_label": 1}, r"file, dataset 'A': no class in it"),
        ({"1": [], "instance_label": 0}, r"dataset 'A', class 1: got \[\]; expected a prompt or a non-empty list"),
        ({"1": 5, "instance_label": 0}, r"class 1: got 5; expected a prompt or a non-empty list"),
        ({"1": None, "instance_label": 0}, r"class 1: got None; expected a prompt"),
        ({"1": "", "instance_label": 0}, r"class 1: prompt '' is empty or no text\. Write one, or remove"),
        ({"1": ["liver", " \t"], "instance_label": 0}, r"class 1: prompt ' \\t' is empty or no text"),
        ({"7": ["liver", 3], "instance_label": 0}, r"class 7: prompt 3 is empty or no text"),
        (
            {"1": "liver[SEP]spleen", "instance_label": 0},
            r"class 1: prompt 'liver\[SEP\]spleen' holds \[SEP\], which separates prompts\. Make it two entries",
        ),
    ],
)
def test_entries_that_cannot_be_used_are_refused_by_dataset_and_class(entry, message):
    with pytest.raises(InputError, match=message) as error:
        parse_class_prompts(entry, "file, dataset 'A'")
    assert isinstance(error.value, GpuparseError)
