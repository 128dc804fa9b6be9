"""The page of `gpuparse preview` in a browser, where one is installed: keys, buttons, and what is seen then."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from gpuparse.preview import DrawOptions, SliceChoice
from gpuparse.preview.choose import choose_rows
from gpuparse.preview.page import ImageFormat, preview_page
from gpuparse.preview.samples import make_samples, open_dataset

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# Runs in the page after its own script: presses keys, looks, and leaves what it saw for the test to read.
DRIVE = """
<script>
(async () => {
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const visible = (element) => element.checkVisibility();
  const look = () => ({
    shown: [...document.querySelectorAll(".sample")].filter(visible).map((sample) => sample.id),
    focus: document.activeElement.id,
    counter: document.querySelector("output").textContent,
    status: document.getElementById("status").textContent,
    hash: location.hash,
    thumbs: [...document.querySelectorAll(".strip button")].map((b) => b.getAttribute("aria-current")),
    pictures: [...document.querySelectorAll(".current figure")].filter(visible).map((figure) => figure.className),
    filter: getComputedStyle(document.querySelector(".current img")).filter,
    outlines: [...document.querySelectorAll(".current .outlines path")].filter(visible).length,
    pressed: [...document.querySelectorAll(".bar [aria-pressed=true]")].map((b) => b.firstChild.data),
  });
  await new Promise((done) => addEventListener("load", done));
  const seen = { loaded: [...document.images].every((i) => i.complete && i.naturalWidth === 72), start: look() };
  for (const [name, keys] of STEPS) {
    for (const key of keys) key.startsWith(".") ? document.querySelector(key).click() : press(key);
    seen[name] = look();
  }
  // Pixels of the third channel alone, as the browser paints it.
  const canvas = document.createElement("canvas"), image = document.querySelector("#s1 .before img");
  canvas.width = canvas.height = 72;
  const context = canvas.getContext("2d");
  context.filter = "url(#channel3)";
  context.drawImage(image, 0, 0);
  seen.pixels = [...context.getImageData(0, 0, 72, 72).data];
  document.body.textContent = "";
  document.body.dataset.seen = JSON.stringify(seen);
})();
</script>
"""


def drive(text, tmp_path, steps, size="1300,900"):
    page = tmp_path / "page.html"
    page.write_text(text + DRIVE.replace("STEPS", json.dumps(list(steps.items()))), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--window-size={size}", "--virtual-time-budget=5000", "--dump-dom", f"file://{page}"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    (seen,) = re.findall(r'data-seen="([^"]*)"', run.stdout)
    return json.loads(seen.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def samples(sample_stores):
    options = DrawOptions(augment=True, size=(72, 72), seed=1)
    dataset = open_dataset(sample_stores["SAMPLE_CT"], "train", options)
    return make_samples(dataset, choose_rows(dataset.store, SliceChoice(num_samples=3)), options)


def test_keys_and_buttons_do_what_they_say(samples, tmp_path):
    steps = {
        "right": ["ArrowRight"],
        "end": ["ArrowRight", "ArrowRight", "ArrowRight"],
        "home": ["Home"],
        "channel": ["2"],
        "colour": ["0"],
        "bare": ["o"],
        "outlined": ["o"],
        "before": ["b"],
        "after": ["b"],
        "both": ["b"],
        "class_off": [".current .class"],
        "class_on": [".current .class"],
        "button": [".bar [data-do=next]", ".bar [data-channel-button='1']"],
        "thumb": [".strip button:last-child"],
    }
    seen = drive(preview_page(samples, "title", "about", ImageFormat()), tmp_path, steps)
    assert seen["loaded"]
    start = seen["start"]
    assert (start["shown"], start["counter"], start["filter"]) == (["s1"], "1 / 3", "none")
    assert start["pressed"] == ["both", "outlines", "RGB"]
    assert start["pictures"] == ["before", "after"]
    num_paths = start["outlines"]
    assert num_paths >= 2
    right = seen["right"]
    assert (right["shown"], right["focus"], right["hash"]) == (["s2"], "s2", "#2")
    assert right["thumbs"] == ["false", "true", "false"]
    assert f"sample 2 of 3: SAMPLE_CT / {samples[1].case}, axis 0 (z)" in right["status"]
    assert seen["end"]["shown"] == ["s3"]
    assert seen["home"]["shown"] == ["s1"]
    assert seen["channel"]["filter"] == 'url("#channel2")'
    assert "previous" in seen["channel"]["pressed"]
    assert seen["colour"]["filter"] == "none"
    assert (seen["bare"]["outlines"], seen["outlined"]["outlines"]) == (0, num_paths)
    assert [seen[name]["pictures"] for name in ("before", "after", "both")] == [
        ["before"], ["after"], ["before", "after"],
    ]  # fmt: skip
    assert 0 < num_paths - seen["class_off"]["outlines"] <= 2
    assert seen["class_on"]["outlines"] == num_paths
    assert (seen["button"]["shown"], seen["button"]["filter"]) == (["s2"], 'url("#channel1")')
    assert seen["thumb"]["shown"] == ["s3"]
    painted = np.array(seen["pixels"], np.uint8).reshape(72, 72, 4)
    third = samples[0].before.pixels[:, :, 2]
    np.testing.assert_array_equal(painted, np.stack([third, third, third, np.full_like(third, 255)], axis=-1))


def test_without_augmentation_there_is_nothing_to_compare(samples, tmp_path):
    import dataclasses

    plain = [dataclasses.replace(sample, after=None) for sample in samples[:2]]
    seen = drive(preview_page(plain, "title", "about", ImageFormat()), tmp_path, {"b": ["b"]})
    assert seen["start"]["pictures"] == seen["b"]["pictures"] == ["before"]
    assert seen["start"]["pressed"] == ["outlines", "RGB"]
