"""`python -m bench.serving.bare BUNDLE SECONDS`: the session alone, in a loop; JSON of images and CPU seconds."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from tta.bundle import load_bundle
from tta.server.predictor import Predictor

SIZES = (1, 8, 16, 32)


def main() -> int:
    """Every size for its share of the seconds."""
    bundle, seconds = load_bundle(Path(sys.argv[1])), float(sys.argv[2])
    predictor = Predictor(bundle, "cpu", 1, max(SIZES))
    session = predictor.prepare()
    found = {}
    for n in SIZES:
        x = np.random.default_rng(0).integers(0, 256, (n, *bundle.manifest.image_shape), np.uint8)
        predictor.run_with(session, x)
        images, cpu, start = 0, time.process_time(), time.monotonic()
        while (elapsed := time.monotonic() - start) < seconds:
            predictor.run_with(session, x)
            images += n
        used = time.process_time() - cpu
        found[str(n)] = {"images_per_s": round(images / elapsed, 2), "cpu_s_per_image": round(used / images, 7)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
