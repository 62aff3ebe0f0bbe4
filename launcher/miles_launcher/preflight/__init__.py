"""What is wrong with hosts, found out before a run needs them: questions to all at once, a judge, one table."""
