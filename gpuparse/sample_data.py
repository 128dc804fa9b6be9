"""Make a small, realistic data folder in BiomedParse's layout: every step can be tried without a download.

``SAMPLE_CT`` looks like abdominal CT (semantic labels, anisotropic voxels), ``SAMPLE_CELLS`` like fluorescent
nuclei (instance labels, isotropic voxels, nearly cubic). All of it is computed, none of it is patient data.

Arrays meet only in ``+ - * /``, ``sqrt`` and comparisons. These round exactly everywhere, so a seed gives the
same voxels on every machine; ``exp``, ``sin`` or a BLAS product would not.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpuparse.errors import InputError
from gpuparse.folders import replace_bytes, replacing
from gpuparse.prompts import PROMPTS_FILE

__all__ = ["make_sample_data"]

_Field: TypeAlias = NDArray[np.floating[Any]]
_Box: TypeAlias = tuple[slice, slice, slice]
_Triple: TypeAlias = tuple[float, float, float]
_Arrays: TypeAlias = dict[str, NDArray[Any]]

_LIVER, _SPLEEN, _RIGHT_KIDNEY, _LEFT_KIDNEY, _AORTA, _VERTEBRA = range(1, 7)

_CLASS_PROMPTS: dict[str, dict[str, list[str] | int]] = {
    "SAMPLE_CT": {
        "1": ["Liver in abdominal CT", "Visualization of the liver in abdominal CT imaging"],
        "2": ["Spleen in abdominal CT", "CT imaging of the spleen within the abdomen", "CT of the spleen"],
        "3": ["Right kidney in abdominal CT", "Presence of the right kidney detected in abdominal CT images"],
        "4": ["Left kidney in abdominal CT", "Abdominal CT showing the left kidney"],
        "5": ["Aorta in abdominal CT", "Abdominal CT showing aortic structures", "CT scan of the aorta"],
        "6": ["Vertebrae in abdominal CT", "Visualization of the vertebrae in abdominal CT imaging"],
        "instance_label": 0,
    },
    "SAMPLE_CELLS": {
        "1": ["Cell nuclei in fluorescence microscopy", "Nuclei in a 3D fluorescence microscopy volume"],
        "instance_label": 1,
    },
}

# (z, y, x) voxels, then (x, y, z) millimetres. Square, even and odd slices, so that padding is exercised too.
_CT_CASES = (
    ((28, 216, 272), (1.3, 1.3, 5.0)),
    ((32, 208, 256), (1.4, 1.4, 5.0)),
    ((24, 256, 256), (1.25, 1.25, 6.0)),
    ((30, 233, 280), (1.2, 1.2, 5.0)),
)
# (z, y, x) voxels, number of nuclei, range of mean radii in voxels. The second needs ids wider than uint8.
_CELL_CASES = (((96, 104, 100), 84, (7.5, 10.0)), ((100, 92, 104), 284, (4.6, 6.2)))
_CELL_SPACING_MM = (0.5, 0.5, 0.5)

_ALL: _Box = (slice(None), slice(None), slice(None))


def make_sample_data(out_dir: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write a small BiomedParse-style data folder with computed volumes.

    The folder holds ``class_prompts.json``, four volumes in ``SAMPLE_CT/train`` and two in
    ``SAMPLE_CELLS/train``. Each ``.npz`` has ``imgs`` (z, y, x) uint8, ``gts`` (z, y, x) uint8, or uint16
    where an id exceeds 255, and ``spacing`` (3,) float64 in x, y, z order, in millimetres. In ``SAMPLE_CT`` z
    rises towards the head, y towards the back, and the patient's right is on the left of the image. Every file
    appears whole or not at all. A second call with the same seed finds its own files and writes nothing.

    Args:
        out_dir: Folder to fill; it is made if it does not exist.
        seed: Seed of every random choice, at least 0. Equal seeds give equal arrays.

    Returns:
        ``out_dir`` as a path.

    Raises:
        InputError: ``seed`` is not a whole number of at least 0; ``out_dir`` holds a file of that name but
            other content, in which case nothing is written; or ``out_dir`` cannot be written.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}; expected a whole number of at least 0. Pass for example seed=0.")
    root = Path(out_dir)
    prompts_path = root / PROMPTS_FILE
    prompts = (json.dumps(_CLASS_PROMPTS, indent=2) + "\n").encode()
    missing: list[tuple[Path, _Arrays]] = []
    try:
        # Every conflict is found before the first write, so a refusal leaves the folder as it was.
        if prompts_path.exists() and prompts_path.read_bytes() != prompts:
            raise InputError(f"{prompts_path} exists and has other content. Pass a new or empty folder.")
        for path, arrays in _cases(root, int(seed)):
            if not path.exists():
                missing.append((path, arrays))
            elif not _holds_arrays(path, arrays):
                raise InputError(
                    f"{path} exists with other content, perhaps from another seed. "
                    "Pass a new folder or the seed it was made with, or delete the file."
                )
        for path, arrays in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, temporary.open("xb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        # The prompts come last: where they are present, the volumes are complete.
        if not prompts_path.exists():
            replace_bytes(prompts_path, prompts)
    except OSError as error:
        raise InputError(
            f"{root}: cannot write sample data there ({error}). Pass a writable folder with 12 MB to spare."
        ) from error
    return root


def _cases(root: Path, seed: int) -> Iterator[tuple[Path, _Arrays]]:
    """Yield the path and the arrays of every sample volume."""
    for i, (shape, spacing_mm) in enumerate(_CT_CASES):
        arrays = _ct_volume(np.random.default_rng([seed, 0, i]), shape, spacing_mm)
        yield root / "SAMPLE_CT" / "train" / f"case_{i + 1:03d}.npz", arrays
    for i, (shape, num_cells, radius_range_px) in enumerate(_CELL_CASES):
        arrays = _cell_volume(np.random.default_rng([seed, 1, i]), shape, num_cells, radius_range_px)
        yield root / "SAMPLE_CELLS" / "train" / f"case_{i + 1:03d}.npz", arrays


def _holds_arrays(path: Path, arrays: _Arrays) -> bool:
    """Whether the npz at `path` holds exactly `arrays`."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return set(found.files) == set(arrays) and all(
                found[key].dtype == value.dtype and np.array_equal(found[key], value) for key, value in arrays.items()
            )
    # AttributeError and TypeError: a bare .npy under this name loads as an array, which has no `files`.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError):
        return False


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], cell_px: _Triple, amplitude: float) -> _Field:
    """Noise of roughly standard deviation `amplitude`: a coarse random grid under a quadratic B-spline.

    `cell_px` is the grid's pitch along z, y and x, in voxels.
    """
    grid_shape = [math.ceil(n / cell) + 3 for n, cell in zip(shape, cell_px, strict=True)]
    field: _Field = rng.random(grid_shape, dtype=np.float32) * 2 - 1
    # The slow axis last: gathering whole planes of the full volume is the cheap order.
    for axis in (2, 1, 0):
        position = np.arange(shape[axis], dtype=np.float32) / cell_px[axis] + rng.random()
        node = position.astype(np.intp)
        t: _Field = (position - node.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(3)])
        low, middle, high = (np.take(field, node + tap, axis=axis) for tap in range(3))
        field = low * ((1 - t) * (1 - t) * 0.5) + middle * (t * (1 - t) + 0.5) + high * (t * t * 0.5)
    # 0.577 is the grid's deviation; averaged over the spline's phase, 0.55 of the variance is left per axis.
    field *= amplitude / (0.577 * 0.55**1.5)
    return field


def _unit(values: _Field) -> _Field:
    """Clip to 0..1."""
    return values.clip(0, 1)


def _jitter(rng: np.random.Generator, at: _Triple, relative: float = 0.0, absolute: float = 0.0) -> _Triple:
    """Scale and shift each value by a uniform random amount."""
    a, b, c = (v * (1 + relative * (2 * rng.random() - 1)) + absolute * (2 * rng.random() - 1) for v in at)
    return a, b, c


def _arrays(image: _Field, labels: NDArray[Any], spacing_mm: _Triple) -> _Arrays:
    """The three arrays of an npz."""
    voxels = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return {"imgs": voxels, "gts": labels, "spacing": np.array(spacing_mm, np.float64)}


class _Abdomen:
    """A slice stack being painted.

    Positions are (u, v, w): u and v in units of half the body's width, 0 at its centre, u towards the image's
    right and v towards the patient's back; w from -1 (lowest slice) to 1 (highest). Smooth noise bends u and
    v, which gives every ellipsoid an organic shape.
    """

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
        self.rng = rng
        self.shape = shape
        num_z, num_y, num_x = shape
        self.unit_px = min(0.43 * num_x, 0.58 * num_y) * (0.96 + 0.04 * rng.random())
        self.x0 = (num_x - 1) * 0.5 + 6 * (rng.random() - 0.5)
        self.y0 = (num_y - 1) * 0.475 + 6 * (rng.random() - 0.5)
        self.image: _Field = np.zeros(shape, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        # `x` and `y` are straight; `u` and `v` are the same coordinates, bent.
        self.x: _Field = (np.arange(num_x, dtype=np.float32) - self.x0) / self.unit_px
        self.y: _Field = ((np.arange(num_y, dtype=np.float32) - self.y0) / self.unit_px)[:, None]
        self.u = self.x + self.noise(_ALL, num_z / 2.5, 0.42, 0.018)
        self.v = self.y + self.noise(_ALL, num_z / 2.5, 0.42, 0.018)
        self.w: _Field = np.linspace(-1, 1, num_z, dtype=np.float32)[:, None, None]

    def soft(self, distance: _Field, edge_px: float = 1.6) -> _Field:
        """Coverage 0..1 from a signed distance (inside positive, in units of half the body's width)."""
        return _unit(distance * (self.unit_px / edge_px) + 0.5)

    def box(self, centre: _Triple, radii: _Triple) -> _Box:
        """Voxels that an ellipsoid and its soft edge can touch, however it is turned."""
        reach = max(radii[:2]) + 0.09
        half = (self.shape[0] - 1) / 2
        z, y, x = (
            slice(max(math.floor(middle - extent), 0), max(math.ceil(middle + extent) + 1, 0))
            for middle, extent in (
                ((centre[2] + 1) * half, radii[2] * 1.1 * half),
                (self.y0 + centre[1] * self.unit_px, reach * self.unit_px),
                (self.x0 + centre[0] * self.unit_px, reach * self.unit_px),
            )
        )
        return z, y, x

    def ball(self, box: _Box, centre: _Triple, radii: _Triple, turn: float = 0, edge_px: float = 1.6) -> _Field:
        """Coverage 0..1 of an ellipsoid over `box`; `turn` rotates it within the slice, in radians."""
        u, v = self.u[box] - centre[0], self.v[box] - centre[1]
        cos, sin = math.cos(turn), math.sin(turn)
        p = (cos * u + sin * v) / radii[0]
        q = (cos * v - sin * u) / radii[1]
        s = (self.w[box[0]] - centre[2]) / radii[2]
        return self.soft((1 - np.sqrt(p * p + q * q + s * s)) * min(radii[:2]), edge_px)

    def paint(self, box: _Box, cover: _Field, value: float | _Field, label: int = 0) -> None:
        """Blend `value` in by `cover` and let `label` own what is covered by more than half."""
        view = self.image[box]
        view += cover * (value - view)
        self.labels[box][cover > 0.5] = label

    def blob(self, centre: _Triple, radii: _Triple, value: float, label: int = 0, turn: float = 0.0) -> None:
        """Paint one ellipsoid."""
        box = self.box(centre, radii)
        self.paint(box, self.ball(box, centre, radii, turn), value, label)

    def noise(self, box: _Box, z_px: float, plane: float, amplitude: float) -> _Field:
        """Smooth noise over `box`, of pitch `z_px` voxels along z and `plane` half body widths in the slice."""
        cell_px = (z_px, plane * self.unit_px, plane * self.unit_px)
        return _smooth_noise(self.rng, self.labels[box].shape, cell_px, amplitude)

    def vessels(self, box: _Box, z_px: float, plane: float, radius: float) -> _Field:
        """Coverage of a web of vessels: two independent noises are both near zero along curves."""
        a, b = self.noise(box, z_px, plane, 1.0), self.noise(box, z_px, plane, 1.0)
        return _unit((radius - np.sqrt(a * a + b * b)) * 9 + 0.5)


def _ct_volume(rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: _Triple) -> _Arrays:
    """Abdominal CT in a soft-tissue window (level 40, width 400 HU): air 0, fat 40, muscle 135, bone 255."""
    ct = _Abdomen(rng, shape)
    texture = ct.noise(_ALL, 1.5, 0.05, 1.0)
    depth = _paint_trunk(ct, texture)
    _paint_bowel(ct)
    _paint_upper_organs(ct, depth, texture)
    for side, label, height in ((-1, _RIGHT_KIDNEY, -0.42), (1, _LEFT_KIDNEY, -0.22)):
        _paint_kidney(ct, side, label, height + 0.06 * (2 * rng.random() - 1))
    _paint_spine_and_vessels(ct)

    # Texture and grain live in tissue only; grain is two pixels wide, as after a reconstruction filter.
    grain = _smooth_noise(rng, shape, (1.0, 1.5, 1.5), 3.2) + texture * 2.2
    ct.image += grain * np.minimum(ct.image / 40, 1)
    return _arrays(ct.image, ct.labels, spacing_mm)


def _paint_trunk(ct: _Abdomen, texture: _Field) -> _Field:
    """Paint table, skin, fat, muscle wall, ribs and cavity; return the depth, 0 (centre) to 1 (skin)."""
    rng = ct.rng
    u2, v2 = ct.u * ct.u, ct.v * ct.v * (1 / 0.72**2)
    # Half ellipse, half box: trunks are rounder than a box and flatter than an ellipse.
    depth: _Field = (np.sqrt(u2 + v2) + np.sqrt(np.sqrt(u2 * u2 + v2 * v2))) * 0.5

    table = 0.011 - np.abs(ct.y - (0.83 - 0.10 * ct.x * ct.x))
    ct.image[:] = ct.soft(table) * (np.abs(ct.x) < 0.93) * 190

    fat_depth = 0.85 + 0.03 * rng.random()
    ct.paint(_ALL, ct.soft(1 - depth), 118)
    ct.paint(_ALL, ct.soft(0.972 - depth), 38 + texture * 1.5)
    ct.paint(_ALL, ct.soft(fat_depth - depth), 134 + texture * 4)
    # Fat planes between the layers of the wall: thin, following the wall.
    layer = np.abs(depth - (fat_depth - 0.045) - texture * 0.002)
    ct.paint(_ALL, ct.soft(0.004 - layer) * 0.55, 60)

    # |u| / (|u| + |v|) is an angle without trigonometry. Ribs descend forwards: w shifts their phase.
    angle = np.abs(ct.u) / (np.abs(ct.u) + np.abs(ct.v) + 1e-3)
    signed = np.where(ct.v > 0, angle, 2 - angle)
    phase = signed * 3.6 + ct.w * 0.9 + rng.random()
    along = np.abs(phase - np.floor(phase) - 0.5)
    rib = ct.soft(np.minimum((0.19 - along) * 0.30, 0.021 - np.abs(depth - (fat_depth - 0.05))))
    rib *= (signed > 0.52) & (signed < 1.35) & (ct.w > -0.75)
    ct.paint(_ALL, rib, 243)

    ct.paint(_ALL, ct.soft(fat_depth - 0.095 - depth), 41 + texture * 3)
    vessels = ct.vessels(_ALL, 3.0, 0.13, 0.13)
    vessels *= ct.soft(fat_depth - 0.14 - depth)
    ct.paint(_ALL, vessels * 0.8, 150)
    depth += 0.755 - (fat_depth - 0.095)  # the cavity's wall is at 0.755 from here on
    return depth


def _paint_bowel(ct: _Abdomen) -> None:
    """Paint loops of small bowel, the colon on both sides, and their contents."""
    rng = ct.rng
    for i in range(26):
        across, forward, up = rng.random(), rng.random(), rng.random()
        if i < 18:  # ileum: low and in front
            centre = (0.92 * across - 0.46, 0.36 * forward - 0.38, 0.95 * up - 1.05)
        else:  # jejunum: higher, on the patient's left, and further back
            centre = (0.12 + 0.40 * across, 0.34 * forward - 0.28, 0.75 * up - 0.45)
        size = 0.085 + 0.04 * rng.random()
        length, height, turn = size * (1 + 0.7 * rng.random()), 0.28 + 0.25 * rng.random(), 3 * rng.random()
        ct.blob(centre, (length, size, height), 142, turn=turn)
        content = 0.0 if rng.random() < 0.2 else 112 + 20 * rng.random()
        ct.blob(centre, (length - 0.025, size - 0.025, height - 0.05), content, turn=turn)
    for side in (-1, 1):
        centre = _jitter(rng, (side * 0.57, 0.06, -0.75), absolute=0.02)
        ct.blob(centre, (0.12, 0.105, 0.62), 138)
        ct.blob(centre, (0.10, 0.085, 0.58), 100)
        ct.blob((centre[0], centre[1] - 0.025, centre[2]), (0.07, 0.05, 0.5), 0)


def _paint_upper_organs(ct: _Abdomen, depth: _Field, texture: _Field) -> None:
    """Paint stomach, pancreas, spleen, liver with its vessels, and gallbladder."""
    rng = ct.rng
    stomach = _jitter(rng, (0.30, -0.20, 0.55), absolute=0.02)
    box = ct.box(stomach, (0.29, 0.23, 0.62))
    ct.paint(box, ct.ball(box, stomach, (0.29, 0.23, 0.62), 0.5) * ct.soft(0.735 - depth[box]), 138)
    lumen = ct.ball(box, stomach, (0.265, 0.205, 0.58), 0.5) * ct.soft(0.715 - depth[box])
    ct.paint(box, lumen, 108 + texture[box] * 3)
    # Gas rises and the fluid's surface is level: the patient lies on the back.
    ct.paint(box, lumen * ct.soft(stomach[1] - 0.075 - ct.y[box[1]]), 0)
    ct.blob(_jitter(rng, (0.13, -0.01, 0.08), absolute=0.02), (0.25, 0.065, 0.26), 139, turn=-0.25)

    spleen = _jitter(rng, (0.57, 0.14, 0.50), absolute=0.015)
    radii = _jitter(rng, (0.19, 0.31, 0.62), relative=0.06)
    box = ct.box(spleen, radii)
    notch = ct.ball(box, (spleen[0] - 0.17, spleen[1] - 0.07, spleen[2]), (0.14, 0.23, 0.75), 0.25)
    crescent = ct.ball(box, spleen, radii, 0.25) * ct.soft(0.738 - depth[box]) * (1 - notch)
    ct.paint(box, crescent, 174 + texture[box] * 2, _SPLEEN)

    box = ct.box((-0.30, -0.1, 0.4), (0.66, 0.56, 1.4))
    # The sum of two very soft lobes: they merge instead of meeting in a crease.
    lobes: _Field = np.zeros_like(ct.u[box])
    for centre, size, turn in (
        ((-0.47, -0.06, 0.42), (0.37, 0.47, 1.15), 0.15),
        ((-0.06, -0.30, 0.62), (0.43, 0.17, 0.62), 0.10),
    ):
        middle, radii = _jitter(rng, centre, absolute=0.02), _jitter(rng, size, relative=0.05)
        lobes += ct.ball(box, middle, radii, turn, edge_px=6.0)
    liver = _unit((lobes - 0.5) * 3.6 + 0.5) * ct.soft(0.738 - depth[box])
    ct.paint(box, liver, 163 + texture[box] * 2, _LIVER)
    vessels = ct.vessels(box, 6.0, 0.22, 0.24)
    covered = ct.labels[box] == _LIVER
    ct.paint(box, vessels * liver * 0.75, 192)
    ct.labels[box][covered] = _LIVER  # vessels inside the liver belong to it
    ct.blob(_jitter(rng, (-0.27, -0.19, -0.20), absolute=0.015), (0.085, 0.115, 0.34), 106, turn=0.3)


def _paint_kidney(ct: _Abdomen, side: int, label: int, height: float) -> None:
    """Paint one kidney (side -1: the patient's right, on the image's left) in its bed of fat."""
    rng = ct.rng
    centre = _jitter(rng, (side * 0.385, 0.235, height), absolute=0.012)
    radii = _jitter(rng, (0.150, 0.178, 0.66), relative=0.06)
    turn = side * 0.45
    ct.blob(centre, (radii[0] + 0.045, radii[1] + 0.045, radii[2] + 0.03), 42, turn=turn)
    box = ct.box(centre, radii)
    hilum = (centre[0] - side * 0.135, centre[1] - 0.045, centre[2])
    cut = ct.ball(box, hilum, (0.12, 0.075, 0.30), -turn)
    cover = ct.ball(box, centre, radii, turn) * (1 - cut)
    core = ct.ball(box, centre, (radii[0] * 0.74, radii[1] * 0.76, radii[2] * 0.8), turn, 7.0)
    # Arterial phase: the cortex is brighter than the medulla; columns of cortex reach between the pyramids.
    columns = ct.noise(box, 2.0, 0.07, 7.0)
    ct.paint(box, cover, 217 - core * (26 + columns), label)
    ct.blob((hilum[0] + side * 0.02, hilum[1], hilum[2]), (0.075, 0.022, 0.13), 188, turn=-turn)


def _paint_spine_and_vessels(ct: _Abdomen) -> None:
    """Paint the muscles of the back, the vertebrae, discs and canal, the aorta and the vena cava."""
    rng = ct.rng
    forever = 9.0
    for side in (-1, 1):
        ct.blob((side * 0.195, 0.475, 0), (0.165, 0.105, forever), 131, turn=side * -0.12)
        ct.blob((side * 0.205, 0.27, -0.75), (0.085, 0.105, 0.95), 136, turn=side * 0.3)
    centre = (0.0, 0.25, 0.0)
    box = ct.box(centre, (0.150, 0.122, forever))
    bone = ct.ball(box, centre, (0.150, 0.122, forever))
    marrow = ct.ball(box, centre, (0.128, 0.100, forever), edge_px=2.5)
    # About four vertebrae: a triangle wave of w, 0 in the middle of a disc, 1 in that of a vertebra.
    phase = ct.w * 2.1 + rng.random()
    wave = 1 - 2 * np.abs(phase - np.floor(phase) - 0.5)
    ct.paint(box, bone, 128)
    ct.paint(
        box,
        bone * _unit((wave - 0.16) * 9 + 0.5),
        246 - marrow * (44 - ct.noise(box, 1.5, 0.027, 7.0)),
        _VERTEBRA,
    )

    for side in (-1, 1):
        ct.blob((side * 0.165, 0.385, 0), (0.115, 0.026, forever), 238, _VERTEBRA, side * -0.25)
    ct.blob((0, 0.405, 0), (0.100, 0.082, forever), 238, _VERTEBRA)
    ct.blob((0, 0.515, 0), (0.026, 0.085, forever), 238, _VERTEBRA)
    ct.blob((0, 0.395, 0), (0.068, 0.052, forever), 120)

    ct.blob(_jitter(rng, (0.060, 0.070, 0.0), absolute=0.01), (0.064, 0.062, forever), 199, _AORTA)
    ct.blob(_jitter(rng, (-0.125, 0.085, 0.0), absolute=0.01), (0.078, 0.056, forever), 176, turn=0.2)


def _cell_volume(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    num_cells: int,
    radius_range_px: tuple[float, float],
) -> _Arrays:
    """Fluorescent nuclei: soft, bent ellipsoids on a dim background, each with an id of its own."""
    smallest, largest = radius_range_px
    # Large ones first: they are the hard ones to place.
    radii = sorted((smallest + (largest - smallest) * rng.random() for _ in range(num_cells)), reverse=True)
    centres = _place_apart(rng, shape, radii)
    pitch = largest * 1.3
    coordinates = [
        _smooth_noise(rng, shape, (pitch, pitch, pitch), 0.11 * largest)
        + np.arange(n, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, n in enumerate(shape)
    ]
    chromatin = _smooth_noise(rng, shape, (2.2, 2.2, 2.2), 1.0) + _smooth_noise(rng, shape, (5, 5, 5), 0.8)

    image = 15 + _smooth_noise(rng, shape, (40, 40, 40), 3.0)
    labels = np.zeros(shape, np.uint16 if num_cells > 255 else np.uint8)
    nearest = np.ones(shape, np.float32)
    glow = np.zeros(shape, np.float32)
    for i, (centre, radius) in enumerate(zip(centres, radii, strict=True)):
        box = tuple(
            slice(max(math.floor(c - 2 * radius), 0), min(math.ceil(c + 2 * radius) + 1, n))
            for c, n in zip(centre, shape, strict=True)
        )
        dz, dy, dx = (field[box] - c for field, c in zip(coordinates, centre, strict=True))
        squared = np.zeros_like(dz)
        for axis_z, axis_y, axis_x in _random_rotation(rng):
            along = (axis_z * dz + axis_y * dy + axis_x * dx) / (radius * (0.84 + 0.3 * rng.random()))
            squared += along * along
        distance = np.sqrt(squared)
        # Every voxel goes to the nucleus it is deepest in, so nuclei may touch but never share a voxel.
        mine = distance < nearest[box]
        nearest[box][mine] = distance[mine]
        labels[box][mine] = i + 1
        brightness = 120 + 95 * rng.random()
        soft = _unit((1 - distance) * (radius / 2.6) + 0.5)
        inside = soft * soft * (3 - 2 * soft) * (brightness + chromatin[box] * (brightness * 0.10))
        haze = _unit(1 - distance * 0.55) * brightness * 0.22
        np.maximum(glow[box], np.maximum(inside, haze), out=glow[box])

    grain = _smooth_noise(rng, shape, (1.4, 1.4, 1.4), 1.0)
    image += glow
    image += grain * np.sqrt(np.maximum(image, 0)) * 0.28
    return _arrays(image, labels, _CELL_SPACING_MM)


def _place_apart(rng: np.random.Generator, shape: tuple[int, int, int], radii: list[float]) -> list[list[float]]:
    """Centres (z, y, x) in voxels, one per radius, no two closer than their radii allow."""
    placed = np.empty((0, 3))
    separation = 1.0
    for i, radius in enumerate(radii):
        apart_px = np.array(radii[:i]) + radius
        while True:
            centre = rng.random(3) * (np.array(shape) - 1 - radius) + radius / 2
            if (((placed - centre) ** 2).sum(axis=1) >= (apart_px * separation) ** 2).all():
                break
            separation *= 0.9998  # slowly give way, so that the loop ends for every seed
        placed = np.vstack([placed, centre])
    centres: list[list[float]] = placed.tolist()
    return centres


def _random_rotation(rng: np.random.Generator) -> list[_Triple]:
    """A rotation matrix, rows first, from a random quaternion."""
    w, x, y, z = (2 * rng.random() - 1 for _ in range(4))
    s = 2 / (w * w + x * x + y * y + z * z)
    return [
        (1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)),
        (s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x)),
        (s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y)),
    ]
