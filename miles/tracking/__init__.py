"""Metrics and where they go: files, terminal, plots. Imports no torch."""
