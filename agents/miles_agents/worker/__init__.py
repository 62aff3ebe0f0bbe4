"""The worker process: an I/O thread that always answers and a main thread that runs the actor."""
