"""What ``benchmarks/async_training.py`` runs: an engine with scripted latencies, a training step of a fixed length."""
