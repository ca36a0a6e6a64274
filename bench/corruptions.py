"""The 15 corruptions of CIFAR-10-C at severities 1 to 5, for 32×32 images, generated here.

Definitions and constants follow hendrycks/robustness (Apache-2.0), `ImageNet-C/create_c/make_cifar_c.py`. The
released arrays were made without a seed, so no generator gives them back bit for bit. By the same formulas and
constants: all but three. Ours in part: `motion_blur` and `snow` (a line kernel of our own instead of
ImageMagick's), `frost` (a procedural texture instead of five photographs). Results are "CIFAR-10-C-style" and
are not to be printed beside published means.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

Array = npt.NDArray[Any]
Rng = np.random.Generator
SIZE = 32
APPROXIMATE = ("motion_blur", "snow", "frost")


def corrupt(name: str, x: Array, severity: int, seed: int = 0) -> Array:
    """Corrupt images.

    Args:
        name: one of `CORRUPTIONS`.
        x: (N, 32, 32, 3) uint8.
        severity: 1 to 5.
        seed: each image draws its own random numbers from it.

    Returns:
        (N, 32, 32, 3) uint8, truncated and not rounded, as the originals are.
    """
    out = CORRUPTIONS[name](x, severity - 1, np.random.default_rng([seed, severity]))
    return out if out.dtype == np.uint8 else (np.clip(out, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(x: Array, s: int, rng: Rng) -> Array:
    """Normal noise on every channel value."""
    return x / 255 + rng.normal(scale=(0.04, 0.06, 0.08, 0.09, 0.10)[s], size=x.shape)


def shot_noise(x: Array, s: int, rng: Rng) -> Array:
    """Poisson noise."""
    c = (500, 250, 100, 75, 50)[s]
    return rng.poisson(x / 255 * c) / c


def impulse_noise(x: Array, s: int, rng: Rng) -> Array:
    """Salt and pepper, half each."""
    hit = rng.random(x.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[s]
    return np.where(hit, rng.random(x.shape) < 0.5, x / 255)


def defocus_blur(x: Array, s: int, rng: Rng) -> Array:
    """A disk, then a small Gaussian against aliasing."""
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[s]
    grid = np.arange(-8, 9)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(float)
    line = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias**2))
    kernel = ndimage.convolve(disk / disk.sum(), np.outer(line, line) / line.sum() ** 2, mode="constant")
    return ndimage.convolve(x / 255, kernel[None, :, :, None], mode="mirror")


def glass_blur(x: Array, s: int, rng: Rng) -> Array:
    """Pixels exchanged with near ones, between two Gaussians."""
    sigma, delta, iterations = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[s]
    out = (ndimage.gaussian_filter(x / 255, (0, sigma, sigma, 0)) * 255).astype(np.uint8)
    rows = np.arange(len(x))
    for _ in range(iterations):
        for h in range(SIZE - delta, delta, -1):
            for w in range(SIZE - delta, delta, -1):
                dx, dy = rng.integers(-delta, delta, (2, len(x)))
                # Not a swap: both pixels end with the neighbour's value, as in the original (views alias).
                out[:, min(h, SIZE - 1), min(w, SIZE - 1)] = out[
                    rows, np.minimum(h + dy, SIZE - 1), np.minimum(w + dx, SIZE - 1)
                ]
    return ndimage.gaussian_filter(out / 255, (0, sigma, sigma, 0))


def _line_kernel(radius: int, sigma: float, angle: float) -> Array:
    """Half a Gaussian along a line, as ImageMagick's motion blur has it; drawn bilinearly."""
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    for step in np.arange(0, radius + 0.01, 0.5):
        row, column = radius - step * np.sin(angle), radius + step * np.cos(angle)
        i, j = int(np.floor(row)), int(np.floor(column))
        for di in (0, 1):
            for dj in (0, 1):
                if i + di <= 2 * radius and j + dj <= 2 * radius:
                    share = (1 - abs(row - i - di)) * (1 - abs(column - j - dj))
                    kernel[i + di, j + dj] += max(share, 0) * np.exp(-(step**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def _motion(x: Array, radius: int, sigma: float, degrees: tuple[float, float], rng: Rng) -> Array:
    """Blur each image along a direction of its own, from 16 within the range."""
    angles = np.deg2rad(np.linspace(*degrees, 16))
    which = rng.integers(16, size=len(x))
    out = np.empty_like(x)
    for i, angle in enumerate(angles):
        mine = which == i
        if mine.any():
            out[mine] = ndimage.convolve(
                x[mine], _line_kernel(radius, sigma, angle)[None, :, :, None], mode="nearest"
            )
    return out


def motion_blur(x: Array, s: int, rng: Rng) -> Array:
    """Blur along a direction; ours, for ImageMagick's."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[s]
    return _motion(x / 255, radius, sigma, (-45, 45), rng)


def _zoom(x: Array, factor: float) -> Array:
    """Zoom the centre, spline order 1, trimmed to 32×32."""
    crop = int(np.ceil(SIZE / factor))
    top = (SIZE - crop) // 2
    zoomed = ndimage.zoom(x[:, top : top + crop, top : top + crop], (1, factor, factor, 1), order=1)
    trim = (zoomed.shape[1] - SIZE) // 2
    return zoomed[:, trim : trim + SIZE, trim : trim + SIZE]


def zoom_blur(x: Array, s: int, rng: Rng) -> Array:
    """The mean of growing zooms of the centre."""
    count = (7, 12, 16, 21, 26)[s]
    scaled = x / 255
    return (scaled + sum(_zoom(scaled, 1 + 0.01 * i) for i in range(count))) / (count + 1)


def snow(x: Array, s: int, rng: Rng) -> Array:
    """Streaks of one-channel noise over a whitened image; the blur of the streaks is ours."""
    mean, std, zoom, threshold, radius, sigma, mix = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[s]
    layer = _zoom(rng.normal(mean, std, (len(x), SIZE, SIZE, 1)), zoom)
    layer = np.clip(np.where(layer < threshold, 0, layer), 0, 1)
    layer = _motion(layer, radius, sigma, (-135, -45), rng)
    scaled = x / 255
    grey = scaled @ np.array([0.299, 0.587, 0.114])
    whitened = mix * scaled + (1 - mix) * np.maximum(scaled, grey[..., None] * 1.5 + 0.5)
    return whitened + layer + layer[:, ::-1, ::-1]


def frost(x: Array, s: int, rng: Rng) -> Array:
    """A mix with a texture of ours, for photographs of frost."""
    a, b = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[s]
    coarse = ndimage.gaussian_filter(rng.normal(size=(len(x), SIZE, SIZE)), (0, 3, 3))
    fine = ndimage.gaussian_filter(rng.normal(size=(len(x), SIZE, SIZE)), (0, 0.7, 0.7))
    texture = coarse / coarse.std() + 0.7 * fine / fine.std()
    crystals = np.clip(0.45 + 0.25 * texture, 0, 1)[..., None] * np.array([0.85, 0.95, 1.0])
    return a * x / 255 + b * crystals


def _plasma(n: int, decay: float, rng: Rng) -> Array:
    """Diamond-square on a 32×32 torus, (n, 32, 32) in [0, 1]."""
    field = np.zeros((n, SIZE, SIZE))
    step, wibble = SIZE, 100.0

    def jitter(corners: Array) -> Array:
        return corners / 4 + wibble * rng.uniform(-wibble, wibble, corners.shape)

    while step >= 2:
        half = step // 2
        corner = field[:, ::step, ::step]
        square = corner + np.roll(corner, -1, 1)
        field[:, half::step, half::step] = jitter(square + np.roll(square, -1, 2))
        centre = field[:, half::step, half::step]
        below = centre + np.roll(centre, 1, 1)
        field[:, ::step, half::step] = jitter(below + corner + np.roll(corner, -1, 2))
        beside = centre + np.roll(centre, 1, 2)
        field[:, half::step, ::step] = jitter(beside + corner + np.roll(corner, -1, 1))
        step, wibble = half, wibble / decay
    field -= field.min(axis=(1, 2), keepdims=True)
    return field / field.max(axis=(1, 2), keepdims=True)


def fog(x: Array, s: int, rng: Rng) -> Array:
    """Plasma fractal fog."""
    a, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[s]
    scaled = x / 255
    brightest = scaled.max(axis=(1, 2, 3), keepdims=True)
    return (scaled + a * _plasma(len(x), decay, rng)[..., None]) * brightest / (brightest + a)


def brightness(x: Array, s: int, rng: Rng) -> Array:
    """More value in HSV."""
    hsv = rgb_to_hsv(x / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + (0.05, 0.1, 0.15, 0.2, 0.3)[s], 0, 1)
    return hsv_to_rgb(hsv)


def contrast(x: Array, s: int, rng: Rng) -> Array:
    """Towards each channel's mean."""
    scaled = x / 255
    mean = scaled.mean(axis=(1, 2), keepdims=True)
    return (scaled - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[s] + mean


def elastic_transform(x: Array, s: int, rng: Rng) -> Array:
    """An affine jitter and a smooth displacement field."""
    alpha, sigma, affine = (
        SIZE
        * np.array(((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)))
    )[s]
    corners = np.array([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]])
    columns, rows = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    flat = np.stack([columns.ravel(), rows.ravel(), np.ones(SIZE * SIZE)])
    out = np.empty(x.shape)
    for i, image in enumerate(x / 255):
        moved = corners + rng.uniform(-affine, affine, corners.shape)
        # Where each output pixel comes from: the inverse of the map that takes the corners to their new places.
        inverse = np.linalg.solve(np.c_[moved, np.ones(3)], corners).T @ flat
        image = _sample(image, inverse[1], inverse[0], "mirror")
        if alpha:
            noise = rng.uniform(-1, 1, (2, SIZE, SIZE))
            dx, dy = (alpha * ndimage.gaussian_filter(n, sigma, mode="reflect", truncate=3) for n in noise)
            image = _sample(image, (rows + dy).ravel(), (columns + dx).ravel(), "reflect")
        out[i] = image
    return out


def _sample(image: Array, rows: Array, columns: Array, mode: str) -> Array:
    channels = [
        ndimage.map_coordinates(image[..., c], (rows, columns), order=1, mode=mode) for c in range(image.shape[2])
    ]
    return np.stack(channels, axis=-1).reshape(image.shape)


def pixelate(x: Array, s: int, rng: Rng) -> Array:
    """Smaller and back by box filters."""
    size = int(SIZE * (0.95, 0.9, 0.85, 0.75, 0.65)[s])
    small = [Image.fromarray(i).resize((size, size), Image.Resampling.BOX) for i in x]
    return np.stack([np.asarray(i.resize((SIZE, SIZE), Image.Resampling.BOX)) for i in small])


def jpeg_compression(x: Array, s: int, rng: Rng) -> Array:
    """Encoded and decoded."""
    out = np.empty_like(x)
    for i, image in enumerate(x):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=(80, 65, 58, 50, 40)[s])
        out[i] = np.asarray(Image.open(buffer))
    return out


CORRUPTIONS: dict[str, Callable[[Array, int, Rng], Array]] = {
    f.__name__: f
    for f in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
