"""The recipe by which a picture becomes a model's input, and its hash.

By the hash a client knows that it has the right one: a resize of its own is a shift. `tta.images` carries it out.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

RESIZES = {  # what each way does, as part of the recipe
    "crop": "scale so that the picture covers the size, rounding each side; cut out the centre, rounding down",
    "stretch": "scale each side to the size",
}


def recipe(image_shape: Sequence[int], resize: str, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """What happens to a picture before the network sees it, in words that another program can follow.

    Args:
        image_shape: (H, W, C).
        resize: see `read_image`.
        mean: of values in [0, 1], per channel.
        std: the same.
    """
    height, width, channels = image_shape
    return {
        "colour": "RGB" if channels == 3 else "L",
        "orientation": "as stored: EXIF is not applied",
        "size": [height, width],
        "resize": RESIZES[resize],
        "interpolation": "bilinear with antialiasing (Pillow's BILINEAR)",
        "dtype": "uint8",
        "layout": "NHWC",
        "mean": [round(float(m), 9) for m in mean],
        "std": [round(float(s), 9) for s in std],
    }


def recipe_hash(steps: dict[str, Any]) -> str:
    """Of a recipe: 16 hexadecimal digits of the SHA-256 of its JSON with sorted keys and no spaces."""
    text = json.dumps(steps, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
