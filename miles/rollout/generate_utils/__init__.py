"""Helpers for generate functions."""
