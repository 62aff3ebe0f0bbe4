"""Packing measured: how long a large rollout's schedule takes, and how good it is, beside other ways to make one."""
