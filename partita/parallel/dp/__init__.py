"""Data parallelism: replicas and ZeRO shards.

Nothing is imported here: rules.py goes without torch.
"""
