"""Sequence parallelism: tokens cut between the regions of tp.

Nothing is imported here: rules.py goes without torch.
"""
