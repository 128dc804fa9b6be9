from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from gpuparse import sheet
from gpuparse.errors import InputError
from gpuparse.panel import COLOURS, Panel
from gpuparse.sheet import contact_sheet

SIDE = 105  # a quarter of the drawn square, so that one source pixel is four drawn pixels
SCALE = sheet._IMAGE_PX // SIDE
LEFT = TOP = sheet._MARGIN_PX + sheet._PAD_PX  # of the first slice on a sheet without title


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def block(y0: int, y1: int, x0: int, x1: int, value: int = 1, side: int = SIDE) -> np.ndarray:
    mask = np.zeros((side, side), np.int64)
    mask[y0:y1, x0:x1] = value
    return mask


def grey(side: int = SIDE, value: int = 100) -> np.ndarray:
    return np.full((3, side, side), value, np.uint8)


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def near(pixels: np.ndarray, colour: str, tolerance: int = 24) -> np.ndarray:
    return (np.abs(pixels - rgb(colour)) <= tolerance).all(axis=-1)


def slice_of(pixels: np.ndarray) -> np.ndarray:
    return pixels[TOP : TOP + sheet._IMAGE_PX, LEFT : LEFT + sheet._IMAGE_PX]


def card_of(panel: Panel) -> sheet._Card:
    return sheet._card(panel, "panel 0", {}, sheet._Type(15.5))


def test_the_outline_lies_on_the_masks_border_and_nowhere_else(tmp_path):
    y0, y1, x0, x1 = 20, 50, 60, 95  # not symmetric: a flip or a transpose would show
    path = contact_sheet([Panel(grey(), block(y0, y1, x0, x1)[None], ["Liver"], "a")], tmp_path / "a.png")
    pixels = slice_of(read(path))
    hit = near(pixels, COLOURS[0])
    for edge in (x0, x1):
        columns = hit[(y0 + 2) * SCALE : (y1 - 2) * SCALE, edge * SCALE - 1 : edge * SCALE + 1]
        assert columns.any(axis=1).all()
    for edge in (y0, y1):
        rows = hit[edge * SCALE - 1 : edge * SCALE + 1, (x0 + 2) * SCALE : (x1 - 2) * SCALE]
        assert rows.any(axis=0).all()
    ys, xs = np.nonzero(hit)
    assert ys.min() >= y0 * SCALE - 2
    assert ys.max() <= y1 * SCALE + 2
    assert xs.min() >= x0 * SCALE - 2
    assert xs.max() <= x1 * SCALE + 2
    assert (pixels[(y0 + 2) * SCALE : (y1 - 2) * SCALE, (x0 + 2) * SCALE : (x1 - 2) * SCALE] == 100).all()
    assert (pixels[: (y0 - 2) * SCALE] == 100).all()


def test_the_prompt_is_written_in_its_outlines_colour(tmp_path):
    masks = np.stack([block(5, 40, 5, 40), block(60, 100, 60, 100)])
    path = contact_sheet([Panel(grey(), masks, ["Liver", "Spleen"], "a")], tmp_path / "a.png")
    below = read(path)[TOP + sheet._IMAGE_PX :]
    first, second = (near(below, colour) for colour in COLOURS[:2])
    assert first.sum() > 60
    assert second.sum() > 60
    assert np.nonzero(first)[0].max() < np.nonzero(second)[0].min()


def test_touching_instances_have_a_colour_each_and_ids_above_255_count(tmp_path):
    labels = block(20, 60, 20, 40) + block(20, 60, 40, 60, 2) + block(70, 90, 20, 60, 300)
    panel = Panel(grey(), np.stack([labels] * 4).astype(np.uint16), ["Nuclei"] * 4, "a")
    pixels = slice_of(read(contact_sheet([panel], tmp_path / "a.png")))
    assert (300 - 1) % len(COLOURS) == 5
    for colour, rows in ((COLOURS[0], (20, 60)), (COLOURS[1], (20, 60)), (COLOURS[5], (70, 90))):
        ys = np.nonzero(near(pixels, colour))[0]
        assert len(ys) > 100
        assert rows[0] * SCALE - 2 <= ys.min() < ys.max() <= rows[1] * SCALE + 2
    (entry,) = [entry for entry, _ in card_of(panel).entries]  # four times the same prompt and mask: listed once
    assert entry.text == "Nuclei (3\N{NO-BREAK SPACE}instances)"


def test_paraphrases_of_one_class_share_one_outline_but_are_both_listed():
    mask = block(10, 30, 10, 30)
    card = card_of(Panel(grey(), np.stack([mask, mask, mask]), ["Liver", "The liver", "Liver"], "a"))
    assert [entry.text for entry, _ in card.entries] == ["Liver", "The liver"]
    assert len({entry.colour for entry, _ in card.entries}) == 1
    assert len(card.outlines) == 1


def test_prompts_without_a_pixel_are_dimmed(tmp_path):
    masks = np.stack([block(10, 30, 10, 30), np.zeros((SIDE, SIDE), np.int64)])
    panel = Panel(grey(), masks, ["Liver", "Spleen"], "a")
    assert [(e.text, e.colour) for e, _ in card_of(panel).entries] == [
        ("Liver", COLOURS[0]),
        ("Spleen (absent)", sheet._ABSENT_COLOUR),
    ]
    pixels = read(contact_sheet([panel], tmp_path / "a.png"))
    assert near(pixels[TOP + sheet._IMAGE_PX :], sheet._ABSENT_COLOUR).sum() > 60
    assert not near(slice_of(pixels), COLOURS[1]).any()


def test_a_prompt_keeps_its_colour_across_the_sheet_and_no_two_masks_of_a_panel_share_one():
    owners: dict[str, int] = {}
    font = sheet._Type(15.5)
    masks = np.stack([block(5 * k, 5 * k + 4, 5, 30) for k in range(9)])
    names = [f"organ {k}" for k in range(9)]
    one = sheet._card(Panel(grey(), masks[:3], names[:3], "a"), "panel 0", owners, font)
    two = sheet._card(Panel(grey(), masks[[2, 4, 1]], ["organ 2", "organ 4", "organ 1"], "b"), "panel 1", owners, font)
    colours = {entry.text: entry.colour for entry, _ in one.entries}
    again = {entry.text: entry.colour for entry, _ in two.entries}
    assert again["organ 1"] == colours["organ 1"]
    assert again["organ 2"] == colours["organ 2"]
    assert again["organ 4"] not in colours.values()
    many = sheet._card(Panel(grey(), masks, names, "c"), "panel 2", {}, font)
    assert len({(entry.colour, str(entry.dash)) for entry, _ in many.entries}) == 9


def test_a_class_map_is_split_by_class(tmp_path):
    labels = block(10, 40, 10, 40, 3) + block(50, 90, 50, 90, 7)
    card = card_of(Panel(grey(), labels, ["Liver", "Aorta", "Spleen"], "a", class_ids=[3, 5, 7]))
    assert [entry.text for entry, _ in card.entries] == ["Liver", "Aorta (absent)", "Spleen"]
    assert [int(mask.sum()) for mask, _ in card.outlines] == [900, 1600]
    card = card_of(Panel(grey(), block(10, 40, 10, 40, 2), ["Liver", "Aorta"], "a"))
    assert [entry.text for entry, _ in card.entries] == ["Liver (absent)", "Aorta"]


def test_channels_are_shown_as_rgb_and_floats_are_clipped(tmp_path):
    image = np.stack([np.full((SIDE, SIDE), v, np.float32) for v in (300.0, 99.6, -20.0)])
    path = contact_sheet([Panel(image, np.zeros((0, SIDE, SIDE), int), [], "a")], tmp_path / "a.png")
    assert (slice_of(read(path)) == (255, 100, 0)).all()


def test_a_slice_that_is_not_square_keeps_its_proportions(tmp_path):
    image = np.full((3, 50, 100), 200, np.uint8)
    mask = np.zeros((1, 50, 100), np.uint8)
    mask[:, 10:40, 20:80] = 1
    pixels = slice_of(read(contact_sheet([Panel(image, mask, ["Liver"], "a")], tmp_path / "a.png")))
    quarter = sheet._IMAGE_PX // 4
    assert (pixels[: quarter - 1] == 0).all()
    assert (pixels[quarter + 2 : quarter + 30] == 200).all()
    assert (pixels[-quarter + 1 :] == 0).all()
    ys, xs = np.nonzero(near(pixels, COLOURS[0]))
    assert abs(xs.min() - 84) <= 2
    assert abs(ys.min() - (quarter + 42)) <= 2


def test_a_mask_that_fills_the_slice_is_outlined_inside_its_square(tmp_path):
    panel = Panel(grey(), np.ones((1, SIDE, SIDE), int), ["All"], "a")
    pixels = read(contact_sheet([panel], tmp_path / "a.png"))
    hit = near(slice_of(pixels), COLOURS[0], 60)
    assert hit[:, 0].mean() > 0.9
    assert hit[0].mean() > 0.9
    assert not near(pixels[TOP : TOP + sheet._IMAGE_PX, :LEFT], COLOURS[0], 60).any()


@pytest.mark.parametrize(("num_panels", "columns", "grid"), [(1, 4, (1, 1)), (3, 2, (2, 2)), (5, 3, (2, 3))])
def test_the_sheet_has_the_size_of_its_grid(tmp_path, num_panels, columns, grid):
    panel = Panel(grey(), block(10, 30, 10, 30)[None], ["Liver"], "a")
    pixels = read(contact_sheet([panel] * num_panels, tmp_path / "a.png", columns=columns))
    num_rows, num_columns = grid
    card_px = sheet._IMAGE_PX + 2 * sheet._PAD_PX
    assert pixels.shape[1] == 2 * sheet._MARGIN_PX + num_columns * card_px + (num_columns - 1) * sheet._GAP_PX
    height = sheet._card_height_px(card_of(panel), sheet._Type(15.5))
    assert pixels.shape[0] == 2 * sheet._MARGIN_PX + num_rows * height + (num_rows - 1) * sheet._GAP_PX


def test_a_title_takes_room_of_its_own(tmp_path):
    panel = Panel(grey(), block(10, 30, 10, 30)[None], ["Liver"], "a")
    plain = read(contact_sheet([panel], tmp_path / "a.png"))
    titled = read(contact_sheet([panel], tmp_path / "b.png", title="Preview"))
    extra = len(titled) - len(plain)
    assert extra > 27
    assert (titled[sheet._MARGIN_PX + extra :] == plain[sheet._MARGIN_PX :]).all()
    assert near(titled[: sheet._MARGIN_PX + extra], sheet._TITLE_COLOUR).sum() > 100


def test_wrapped_text_is_complete_and_never_wider_than_its_room():
    font = sheet._Type(15.5)
    text = "Presence of the right kidney detected in " + "extraordinarily" * 6 + " long abdominal CT images"
    lines = font.wrap(text, 200)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.width_px(line) <= 200 for line in lines)
    assert lines[0].startswith("Presence of the")
    assert font.wrap("", 200) == [""]


def test_long_prompts_stay_inside_their_card(tmp_path):
    prompts = [
        "Visualization of something very long indeed in abdominal CT imaging " * 3,
        "W" * 90,
        "Mathematics: $x_{$",
    ]
    masks = np.stack([block(30 * k, 30 * k + 20, 5, 30) for k in range(3)])
    path = contact_sheet([Panel(grey(), masks, prompts, "folder / " * 30)], tmp_path / "a.png")
    pixels = read(path)
    inner = slice(sheet._MARGIN_PX + 2, -sheet._MARGIN_PX - 2)
    below = pixels[TOP + sheet._IMAGE_PX : -sheet._MARGIN_PX - 4, inner]
    written = ~near(below, sheet._CARD, 6)
    assert written.any(axis=1).sum() > 100
    assert not written[:, : sheet._PAD_PX - 4].any()  # the card's padding stays free on both sides
    assert not written[:, -sheet._PAD_PX + 4 :].any()
    assert not written[-sheet._PAD_PX + 4 :].any()
    for colour in COLOURS[:3]:
        assert near(below, colour).any()


def test_a_prompt_in_letters_that_cannot_be_drawn_is_drawn_without_a_warning(tmp_path, recwarn):
    prompts = ["\u65e5\u672c\u8a9e", "half a letter \ud800 and \x00"]
    masks = np.stack([block(5, 30, 5, 30), block(50, 80, 5, 30)])
    assert contact_sheet([Panel(grey(), masks, prompts, "a")], tmp_path / "a.png").exists()
    assert not recwarn.list


def test_masks_of_one_colour_key_have_one_colour_across_the_sheet():
    owners: dict[str, int] = {}
    font = sheet._Type(15.5)
    masks = np.stack([block(10, 30, 10, 30), block(50, 70, 10, 30)])
    keys = ["organ 1", "organ 2"]
    one = sheet._card(Panel(grey(), masks, ["Liver", "Spleen"], "a", colour_keys=keys), "panel 0", owners, font)
    two = sheet._card(
        Panel(grey(), masks[::-1], ["The spleen", "The liver"], "b", colour_keys=keys[::-1]), "panel 1", owners, font
    )
    assert [entry.colour for entry, _ in one.entries] == [entry.colour for entry, _ in two.entries][::-1]


def test_equal_input_gives_equal_bytes_whatever_the_users_matplotlib_settings(tmp_path):
    panel = Panel(grey(), block(10, 30, 10, 30)[None], ["Liver"], "a")
    first = contact_sheet([panel], tmp_path / "a.png", title="t").read_bytes()
    before = dict(mpl.rcParams)
    mine = {
        "savefig.bbox": "tight",
        "font.family": "serif",
        "text.usetex": True,
        "image.origin": "lower",
        "font.size": 30,
    }
    with mpl.rc_context(mine):
        second = contact_sheet([panel], tmp_path / "b.png", title="t").read_bytes()
    assert first == second
    assert dict(mpl.rcParams) == before


def test_pyplot_is_never_imported():
    code = "import sys, gpuparse.sheet; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_file_is_replaced_whole_and_no_scrap_is_left(tmp_path, monkeypatch):
    panel = Panel(grey(), block(10, 30, 10, 30)[None], ["Liver"], "a")
    path = contact_sheet([panel], tmp_path / "deep" / "er" / "a.png")
    old = path.read_bytes()

    def fail(self, file, **kwargs):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(sheet.FigureCanvasAgg, "print_png", fail)
    with pytest.raises(InputError, match=r"a\.png: cannot write the contact sheet \(disk full\)"):
        contact_sheet([panel], path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_folder_in_the_files_place_is_reported(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="cannot write the contact sheet"):
        contact_sheet([Panel(grey(), block(1, 3, 1, 3)[None], ["Liver"], "a")], tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


GOOD = {"image": grey(), "labels": block(1, 3, 1, 3)[None], "prompts": ["Liver"], "caption": "case 7"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": grey()[:2]}, r"panel 0 \('case 7'\): image has shape \(2, 105, 105\); expected \(3, H, W\)"),
        ({"image": grey().transpose(1, 2, 0)}, r"image has shape \(105, 105, 3\).*Move the channels"),
        ({"image": grey().astype(np.int32)}, "image has dtype int32; expected uint8 or float"),
        ({"image": np.full((3, SIDE, SIDE), np.nan)}, "image holds NaN or infinity"),
        ({"image": np.linspace(0, 1, 3 * SIDE**2).reshape(3, SIDE, SIDE)}, r"values in 0\.\.1; .*Multiply it by 255"),
        ({"labels": np.zeros((1, SIDE, SIDE), np.float32)}, "labels has dtype float32; expected integers"),
        ({"labels": np.zeros((1, 50, 50), int)}, r"labels has shape \(1, 50, 50\); expected \(P, 105, 105\)"),
        ({"labels": -block(1, 3, 1, 3)[None]}, "labels holds -1; expected ids of at least 0"),
        ({"labels": np.zeros((2, SIDE, SIDE), int)}, "labels has 2 masks but there are 1 prompts"),
        (
            {"labels": block(1, 3, 1, 3, 4)},
            r"class map holds \[4\], which no prompt stands for; expected only 0 and \[1\]",
        ),
        ({"labels": block(1, 3, 1, 3), "class_ids": [1, 2]}, "there are 2 class_ids but 1 prompts"),
        ({"prompts": "Liver[SEP]Spleen"}, r"prompts is a str; expected a sequence.*text\.split\('\[SEP\]'\)"),
        ({"prompts": [3]}, "prompts holds 3; expected strings only"),
        ({"colour_keys": ["a", "b"]}, "there are 2 colour_keys but 1 prompts; expected one for each"),
        ({"caption": 7}, "panel 0: caption is a int; expected str"),
    ],
)
def test_a_wrong_panel_is_refused_with_its_place_and_a_remedy(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        contact_sheet([Panel(**{**GOOD, **change})], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"panels": []}, "panels is empty"),
        ({"panels": [GOOD]}, r"panel 0 is a dict; expected a Panel"),
        ({"columns": 0}, "columns is 0; expected a whole number of at least 1"),
        ({"columns": 2.0}, r"columns is 2\.0"),
        ({"name": "a.jpg"}, r"a\.jpg'; a contact sheet is a PNG"),
        ({"title": 3}, "title is a int; expected str or None"),
        ({"panels": [Panel(**GOOD)] * 200, "columns": 200}, "the sheet would be .* pixels; at most 65000"),
    ],
)
def test_a_wrong_argument_is_refused(tmp_path, change, message):
    given = {"panels": [Panel(**GOOD)], "columns": 4, "title": None, "name": "a.png", **change}
    with pytest.raises(InputError, match=message):
        contact_sheet(given["panels"], tmp_path / given["name"], columns=given["columns"], title=given["title"])


def test_legends_are_cut_where_a_sheet_would_be_too_tall(tmp_path, monkeypatch):
    def panel(num_prompts):
        ids = np.arange(1, num_prompts + 1)
        labels = np.zeros((SIDE, SIDE), np.int64)
        labels.flat[ids] = ids
        return Panel(grey(), labels, [f"class {i}" for i in ids], "a")

    def legends(num_prompts):
        """Texts of a sheet of two rows, but for captions."""
        figure = sheet._drawn([panel(n) for n in num_prompts], 1, None)
        height_px = round(figure.get_figheight() * sheet._DPI)
        return height_px, [text.get_text() for text in figure.texts if text.get_text() != "a"]

    whole = [f"class {i}" for i in range(1, 41)]
    full_px, texts = legends([40, 3])
    assert texts == whole + whole[:3]
    monkeypatch.setattr(sheet, "_MAX_SIDE_PX", full_px)
    assert legends([40, 3]) == (full_px, texts)  # just fits
    cut_px = full_px - 500
    monkeypatch.setattr(sheet, "_MAX_SIDE_PX", cut_px)
    height_px, texts = legends([40, 3])
    num_kept = len(texts) - 1 - 3
    assert 5 < num_kept < 40
    assert texts == [*whole[:num_kept], f"and {40 - num_kept} more prompts", *whole[:3]]
    assert height_px <= cut_px
    _, (*shown, more) = legends([3, 400])  # a row has its half of the room, to the last line
    assert (shown[3:], more) == (whole[:num_kept], f"and {400 - num_kept} more prompts")
    assert contact_sheet([panel(40)] * 2, tmp_path / "a.png", columns=1).exists()
    with Image.open(tmp_path / "a.png") as image:
        assert image.height <= cut_px
    monkeypatch.setattr(sheet, "_MAX_SIDE_PX", 1000)
    with pytest.raises(
        InputError, match=r"the sheet would be \d+ x \d+ pixels; at most 1000 can be drawn\. Pass fewer"
    ):
        contact_sheet([panel(40)] * 2, tmp_path / "b.png", columns=1)


def test_an_image_of_zeros_and_ones_is_not_mistaken_for_a_scaled_one(tmp_path):
    image = (block(10, 40, 10, 40) * np.ones((3, 1, 1))).astype(np.float32)
    assert contact_sheet([Panel(**{**GOOD, "image": image})], tmp_path / "a.png").exists()
