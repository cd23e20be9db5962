"""Empty on purpose: rules.py here must import without torch."""
