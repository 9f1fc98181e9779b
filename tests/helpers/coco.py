"""A made-up folder in the form of COCO 2014: images of several shapes, captions in one file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_coco(folder: Path, images: int = 20) -> Path:
    """Write val2014/ and annotations/captions_val2014.json, two captions an image; return it."""
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    rng, listed, annotations = np.random.default_rng(0), [], []
    for i in range(images):
        name, height, width = f"COCO_val2014_{i + 1:012d}.jpg", 20 + i % 3 * 8, 20 + i % 2 * 12
        colour = rng.integers(0, 200, 3)
        pixels = colour + rng.integers(0, 56, (height, width, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        (image.convert("L") if i == 1 else image).save(folder / "val2014" / name)
        listed.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        words = f"a {('red', 'blue')[i // 2 % 2]} {('circle', 'ring')[i % 2]}"
        for k, caption in enumerate((f"{words} \n", f"{words}  at the top")):
            annotations.append({"image_id": i + 1, "id": 10 * i + k + 5, "caption": caption})
    file = folder / "annotations" / "captions_val2014.json"
    file.write_text(json.dumps({"info": {}, "images": listed, "annotations": annotations[::-1]}))
    return file
