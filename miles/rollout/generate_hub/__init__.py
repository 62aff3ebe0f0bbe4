"""Generate functions that come with the package."""
