"""Rollout: data, generation, rewards, filters, the ledger, and the rollout manager."""
