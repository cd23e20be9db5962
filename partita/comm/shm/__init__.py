"""Ranks of one host in shared memory: segments of operands, mailboxes, futexes to wait."""
