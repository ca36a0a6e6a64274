"""The hot process: admits requests, batches them, runs the model, swaps versions between batches."""

import os

# onnxruntime, imported beneath this package only, reports machine and models to its maker (from 1.29 on, on Linux
# too) unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
