"""What the augmentation tests compare with: each step in numpy and cv2, in float64, from the published algorithms."""

from __future__ import annotations

import platform

import cv2
import numpy as np

from gpuparse.sampling import PARAMS_DTYPE

# The counter word that says what a random number is for.
NOISE, SALT = 16, 17

# How far cv2's bilinear resizing of float32 is from exact, in grey levels; its code for Arm has less exact positions.
CV2_ATOL = 1e-3 if platform.machine() == "x86_64" else 1e-2


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10 of (n, 4) counters under one key, (n, 4) uint32."""
    a, b, c, d = np.asarray(counters, np.uint64).T
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for i in range(10):
        k0, k1 = (np.uint64((int(k) + i * weyl) % 2**32) for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = second >> half ^ b ^ k0, second & low, first >> half ^ d ^ k1, first & low
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


def box_muller(words: np.ndarray) -> np.ndarray:
    """(n, 2) words -> (n, 2) normals in float64: 24 bits of the first make the radius, the second is the angle.

    The uniform is rounded to float32, as the kernels have it: above 1/2 its last bit is worth a whole step.
    """
    uniform = ((words[:, 0] >> 8) + 0.5).astype(np.float32).astype(np.float64) / 2**24
    radius = np.sqrt(-2 * np.log(uniform))
    angle = 2 * np.pi * words[:, 1] / 2**32
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def field_words(params: np.void, purpose: int, channel: int, height: int, width: int) -> np.ndarray:
    """One word per pixel, (height * width,) uint32: four consecutive pixels share a Philox block."""
    num_blocks = -(-height * width // 4)
    counters = np.zeros((num_blocks, 4), np.uint32)
    counters[:, 0], counters[:, 1], counters[:, 2] = np.arange(num_blocks), purpose, channel
    counters[:, 3] = params["random_salt"]
    return philox(counters, (int(params["key0"]), int(params["key1"]))).reshape(-1)


def normals(params: np.void, height: int, width: int) -> np.ndarray:
    """(3, height, width) standard normals of a sample."""
    fields = [box_muller(field_words(params, NOISE, c, height, width).reshape(-1, 2)).reshape(-1) for c in range(3)]
    return np.stack([field[: height * width].reshape(height, width) for field in fields])


def symmetry(plane: np.ndarray, params: np.void) -> np.ndarray:
    """Quarter turns by numpy, then the flip by cv2."""
    turned = np.ascontiguousarray(np.rot90(plane, int(params["rotate"])))
    return cv2.flip(turned, {1: 0, 2: 1, 3: -1}[int(params["flip"])]) if params["flip"] else turned


def region(plane: np.ndarray, params: np.void) -> np.ndarray:
    """The crop's region with zeros outside the plane."""
    top, left, height, width = (int(params[f"crop_{name}"]) for name in ("top", "left", "height", "width"))
    out = np.zeros((height, width), plane.dtype)
    y0, y1 = max(top, 0), min(top + height, plane.shape[0])
    x0, x1 = max(left, 0), min(left + width, plane.shape[1])
    if y0 < y1 and x0 < x1:
        out[y0 - top : y1 - top, x0 - left : x1 - left] = plane[y0:y1, x0:x1]
    return out


def geometry(plane: np.ndarray, params: np.void) -> np.ndarray:
    """A channel, (height, width) float64, after turns, flip and crop."""
    if params["zero"]:
        return np.zeros(plane.shape)
    height, width = plane.shape
    plane = symmetry(plane, params)
    if not params["crop"]:
        return plane.astype(np.float64)
    cut = region(plane, params).astype(np.float32)
    resized = cv2.resize(cut, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float64)
    return np.rint(resized) if params["crop_round"] else resized


def augmented_image(image: np.ndarray, params: np.void) -> np.ndarray:
    """(3, height, width) uint8 -> float64, all steps in the reference's order."""
    value = np.stack([geometry(channel, params) for channel in image])
    value = value + float(params["shift"])
    height, width = image.shape[1:]
    if params["noise_mode"]:
        noise = normals(params, height, width) * float(params["noise_std"])
        if params["noise_mode"] == 1:
            value = value + noise
        else:
            # What the x86 conversion float -> uint8 does: cut towards zero, keep the low byte.
            wrapped = np.trunc(noise) % 256
            value = (np.trunc(value) + wrapped) % 256 if params["noise_mode"] == 3 else value + wrapped
    words = field_words(params, SALT, 0, height, width)[: height * width].reshape(height, width)
    hit = words >> 1 < params["salt_threshold"]
    value = np.where(hit, np.where(words & 1, 255.0, 0.0), value)
    return value[[0, 2, 1]] if params["swap"] else value


def augmented_mask(mask: np.ndarray, params: np.void) -> np.ndarray:
    """(height, width) encoded ids, augmented, in int64."""
    mask = mask.astype(np.int64)
    if params["zero"]:
        return np.zeros_like(mask)
    mask = mask & 255 if params["wrap_ids"] else mask
    height, width = mask.shape
    mask = symmetry(mask.astype(np.float64), params)  # cv2 knows no 64-bit integers; ids are exact in float64
    if params["crop"]:
        mask = cv2.resize(region(mask, params), (width, height), interpolation=cv2.INTER_NEAREST)
    return mask.astype(np.int64)


def labels_of(ids: np.ndarray, mode: str, class_ids: np.ndarray) -> np.ndarray:
    """One sample's labels from its (height, width) ids."""
    if mode == "prompts":
        return np.stack([(ids == class_id).astype(np.int64) for class_id in class_ids])
    if mode == "instances":
        return np.stack([ids] * len(class_ids))
    return ids if mode == "classes" else np.where(ids > 0, class_ids[0], 0)


def random_params(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Tables of all effects, far beyond what is ever drawn; half of the effects are off in any row."""
    params = np.zeros(count, PARAMS_DTYPE)

    def some(values):
        return np.where(rng.random(count) < 0.5, values, 0)

    side = max(height, width)
    params["rotate"] = some(rng.integers(0, 4, count)) * (1 if height == width else 2) % 4
    params["flip"] = some(rng.integers(0, 4, count))
    params["crop"] = some(1)
    params["crop_top"], params["crop_left"] = (rng.integers(-side, side + 1, count) for _ in range(2))
    params["crop_height"], params["crop_width"] = (rng.integers(1, 2 * side + 1, count) for _ in range(2))
    params["crop_round"] = some(1)
    params["shift"] = some(rng.uniform(-60, 60, count))
    params["noise_mode"] = some(rng.integers(1, 4, count))
    params["noise_std"] = rng.uniform(0, 30, count)
    params["salt_threshold"] = some(rng.integers(0, 2**29, count))
    params["swap"] = some(1)
    params["zero"] = rng.random(count) < 0.05
    params["wrap_ids"] = some(1)
    for name in ("key0", "key1", "random_salt"):
        params[name] = rng.integers(0, 2**32, count)
    return params
