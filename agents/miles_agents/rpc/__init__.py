"""Actors, meshes and calls: what a user of the runtime programs against."""
