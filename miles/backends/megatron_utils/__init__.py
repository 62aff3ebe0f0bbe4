"""The Megatron-core backend."""
