"""The training job: the loop that the controller runs. Imports no torch."""
