"""Measurements of tta, one question a script."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # see tta/server: before onnxruntime is imported
