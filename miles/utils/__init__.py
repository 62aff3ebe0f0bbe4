"""What several parts need; module paths that user code imports."""
