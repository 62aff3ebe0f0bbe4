"""Miles: RL post-training of language models on the runtime below it."""
