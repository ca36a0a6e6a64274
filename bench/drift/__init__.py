"""Is the monitor as good as it must be, and as the libraries people use today? `python -m bench.drift`."""
