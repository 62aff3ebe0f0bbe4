"""Formulas: advantages, losses, corrections, log-probabilities."""
