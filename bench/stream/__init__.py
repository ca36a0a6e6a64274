"""Is a model better off with tta on a stream that never stops changing? `python -m bench.stream`."""
