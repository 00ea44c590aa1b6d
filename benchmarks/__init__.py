"""One benchmark per claim of speed or memory; run each from the root, for example `python -m benchmarks.maps`."""
