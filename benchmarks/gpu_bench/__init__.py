"""Parts of ``benchmarks/gpu/run.py``."""
