"""Shared by tests: clusters, leak checks, processes that misbehave."""
