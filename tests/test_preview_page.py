"""The page of `gpuparse preview`: what is in it is what was made, whatever the prompts hold, and nothing is fetched."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import gpuparse
from gpuparse.panel import COLOURS
from gpuparse.preview import DrawOptions, SliceChoice
from gpuparse.preview.choose import choose_rows
from gpuparse.preview.page import ImageFormat, preview_page
from gpuparse.preview.samples import make_samples, open_dataset

SIZE = (72, 72)
ODD_PROMPTS = {
    "1": ["</script><script>alert(1)</script> \"double\" 'single' & {{samples}} {{title}}"],
    "2": ["日本語 \u2028 naïve $x_{$ `tick` ${x}"],
    "2000000000": ["<img src=x onerror=alert(1)>"],
}


class Page(HTMLParser):
    """A page as a browser takes it apart: each sample's images, outlines, texts, and all tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.samples, self._stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        classes = (values.get("class") or "").split()
        if tag == "article":
            self.samples.append({"images": [], "outlines": [], "texts": {}, "buttons": []})
        sample = self.samples[-1] if self.samples else None
        if sample is not None and tag == "img":
            sample["images"].append(values)
        if "outlines" in classes and tag == "svg":
            sample["outlines"].append([])
        if tag == "path":
            sample["outlines"][-1].append(values)
        if "class" in classes and tag == "button":
            sample["buttons"].append(values)
        if tag not in ("img", "path", "line", "meta", "fecolormatrix"):
            self._stack.append((tag, classes))

    def handle_endtag(self, tag):
        if tag not in ("img", "path", "line", "meta", "fecolormatrix"):
            assert self._stack.pop()[0] == tag  # every tag is closed, in order

    def handle_data(self, data):
        if not self.samples or not self._stack or not data.strip():
            return
        texts = self.samples[-1]["texts"]
        tag, classes = self._stack[-1]
        inside_drawn = any("drawn" in outer for _, outer in self._stack)
        name = "words" if inside_drawn and tag == "li" else (classes or [tag])[0]
        texts.setdefault(name, []).append(data)


def pixels_in(values):
    kind, _, data = values["src"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        assert image.format.lower() == kind.rpartition("/")[2]
        return np.asarray(image.convert("RGB"))


def inside(path_data, shape):
    """The pixels whose centres a path encloses, by the even-odd rule: crossings to the right of each, counted."""
    edges = []
    for part in re.findall(r"M(-?\d+) (-?\d+)l([^Mz]*)z", path_data):
        x, y = int(part[0]), int(part[1])
        start = (x, y)
        moves = list(map(int, part[2].split()))
        for dx, dy in zip(moves[::2], moves[1::2], strict=True):
            edges.append((x, y, x + dx, y + dy))
            x, y = x + dx, y + dy
        edges.append((x, y, *start))
    assert "z" in path_data
    assert path_data.count("M") == path_data.count("z")  # closed at the border too
    mask = np.zeros(shape, bool)
    x_of = 2 * np.arange(shape[1]) + 1
    for row in range(shape[0]):
        level = 2 * row + 1
        for x0, y0, x1, y1 in edges:
            if (y0 <= level) != (y1 <= level):
                mask[row] ^= x_of < x0 + (level - y0) * (x1 - x0) / (y1 - y0)
    return mask


def samples_of(path, choice=None, **drawing):
    choice = choice or SliceChoice(num_samples=4)
    options = DrawOptions(size=SIZE, **drawing)
    dataset = open_dataset(path, choice.split, options)
    return make_samples(dataset, choose_rows(dataset.store, choice), options)


def page_of(samples, **images):
    return preview_page(samples, "title", "about", ImageFormat(**images))


@pytest.fixture
def odd_store(write_case, data_dir):
    labels = np.zeros((6, 60, 90), np.uint32)
    labels[1:4, 5:20, 5:30] = 1
    labels[2:5, 30:50, 40:80] = 2
    labels[3, 50:58, 0:9] = 2_000_000_000
    image = np.random.default_rng(0).integers(0, 256, labels.shape, np.uint8)
    write_case(image, labels, name="a & 'b' <i>", dataset="ODD", prompts=ODD_PROMPTS)
    return gpuparse.convert(data_dir).datasets[0].store_path


@pytest.mark.parametrize("name", ["SAMPLE_CT", "SAMPLE_CELLS", "mixed", "odd"])
def test_images_outlines_and_words_are_those_of_the_samples(sample_stores, mixed_store, odd_store, name):
    path = {"mixed": mixed_store.path, "odd": odd_store}.get(name) or sample_stores[name]
    samples = samples_of(path, SliceChoice(num_samples=9 if name == "mixed" else 4), augment=True, seed=2)
    page = Page(page_of(samples))
    assert len(page.samples) == len(samples)
    for sample, shown in zip(samples, page.samples, strict=True):
        pictures = (sample.before, sample.after)
        assert len(shown["images"]) == 2
        for picture, values, outlines in zip(pictures, shown["images"], shown["outlines"], strict=True):
            np.testing.assert_array_equal(pixels_in(values), picture.pixels)
            if sample.is_instance:
                for colour in COLOURS:
                    ids = picture.labels.astype(np.int64)
                    wanted = (ids > 0) & ((ids - 1) % len(COLOURS) == COLOURS.index(colour))
                    drawn = [path for path in outlines if path["stroke"] == colour]
                    assert len(drawn) == wanted.any()
                    for path in drawn:
                        # Touching instances of one colour: each its own outline, so that pixels are counted once.
                        np.testing.assert_array_equal(inside(path["d"], SIZE), wanted)
            else:
                ids = {class_id for class_id, _ in sample.prompts}
                assert {int(p["data-class"]) for p in outlines} == ids & set(np.unique(picture.labels).tolist())
                for path in outlines:
                    mask = picture.labels == int(path["data-class"])
                    np.testing.assert_array_equal(inside(path["d"], SIZE), mask)
                styles = [(path["stroke"], path.get("stroke-dasharray")) for path in outlines]
                assert len(set(styles)) == len(styles)
        assert shown["texts"].get("words", []) == list(sample.words)
        assert shown["texts"].get("prompt", []) == [text for _, text in sample.prompts]
        assert [int(b["data-class"]) for b in shown["buttons"]] == [class_id for class_id, _ in sample.prompts]
        assert shown["texts"].get("id", []) == [str(class_id) for class_id, _ in sample.prompts]
        assert shown["texts"]["h2"] == [f"{sample.dataset} / {sample.case}"]
        assert f"axis {sample.key.axis} (" in shown["texts"]["place"][0]
        assert f"slice {sample.key.position} of 0 to {sample.num_slices - 1}" in shown["texts"]["place"][0]


def test_nothing_is_fetched_and_nothing_of_a_prompt_is_taken_for_html(odd_store):
    text = page_of(samples_of(odd_store, augment=True))
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    for tag, values in page.tags:
        assert tag not in ("link", "iframe", "object", "i", "b")
        assert not [key for key in values if key.startswith("on")]
        for key in ("src", "href", "xlink:href"):
            assert (values.get(key) or "data:").startswith("data:")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", re.sub(r"base64,[^\"]*", "", text))
    policy = next(values["content"] for _, values in page.tags if values.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "{{" not in text.replace("{{samples}} {{title}}", "")
    alts = [values["alt"] for tag, values in page.tags if tag == "img"]
    assert any("a & 'b' <i>, axis 0 (z)" in alt and "Outlined: </script>" in alt for alt in alts)


def test_prompts_are_shown_as_training_draws_them(sample_stores):
    samples = samples_of(sample_stores["SAMPLE_CT"], num_prompts=4)
    page = Page(page_of(samples))
    for sample, shown in zip(samples, page.samples, strict=True):
        assert len(sample.prompts) == 4
        assert shown["texts"]["prompt"] == [text for _, text in sample.prompts]
        absent = sum(not (sample.before.labels == class_id).any() for class_id, _ in sample.prompts)
        assert shown["texts"].get("share", []).count("not in this slice") == absent


def test_without_augmentation_there_is_one_picture_and_no_words(sample_stores):
    samples = samples_of(sample_stores["SAMPLE_CELLS"], SliceChoice(num_samples=2))
    text = page_of(samples)
    page = Page(text)
    assert [len(shown["images"]) for shown in page.samples] == [1, 1]
    assert "Drawn augmentation" not in text
    assert 'data-augmented="false"' in text


def test_a_slice_without_a_class_says_so(mixed_store):
    samples = samples_of(mixed_store.path, SliceChoice(cases=("empty",), num_samples=1))
    page = Page(page_of(samples))
    assert "No class in this slice." in page.samples[0]["texts"]["p"]
    assert page.samples[0]["outlines"] == [[]]


def test_a_class_keeps_its_colour_from_sample_to_sample(sample_stores):
    page = Page(page_of(samples_of(sample_stores["SAMPLE_CT"], SliceChoice(num_samples=8))))
    colours = {(p["data-class"], p["stroke"]) for shown in page.samples for p in shown["outlines"][0]}
    assert len(colours) == len({class_id for class_id, _ in colours}) > 3


def test_jpeg_is_smaller_and_close(sample_stores):
    samples = samples_of(sample_stores["SAMPLE_CT"], SliceChoice(num_samples=2))
    exact, jpeg = page_of(samples), page_of(samples, jpeg=True)
    sizes = [sum(len(v["src"]) for s in Page(text).samples for v in s["images"]) for text in (exact, jpeg)]
    assert sizes[1] < 0.8 * sizes[0]
    for sample, shown in zip(samples, Page(jpeg).samples, strict=True):
        difference = np.abs(pixels_in(shown["images"][0]).astype(int) - sample.before.pixels.astype(int))
        assert difference.mean() < 3
