"""What judges answers: the built-in rewards and their dispatch."""
