"""Low-rank adapters: what both backends share."""
