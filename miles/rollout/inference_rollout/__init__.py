"""The class-based rollout function and its parts."""
