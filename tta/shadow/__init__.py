"""The server's predictor in a niced process: any version, off the hot path."""
