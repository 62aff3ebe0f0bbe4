"""The parts of ``benchmarks/runtime.py``: what is measured (``rows``), by whom (``system_*``), how it is told."""
