"""Ranks as threads of one process: where they meet, and their Comm."""
