"""Stand-ins for libraries that are not there on a CPU: on PYTHONPATH of the CPU engine process, and of nothing else."""
