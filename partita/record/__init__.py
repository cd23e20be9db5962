"""What a run records: spans of time, transfers, bytes held."""
