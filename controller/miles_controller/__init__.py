"""The controller: meshes, placement, supervision, status. It never runs user code and never imports torch."""
