"""Offload of states, activations and shards to the host and to files.

Nothing is imported here: rules.py goes without torch.
"""
