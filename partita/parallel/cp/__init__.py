"""Context parallelism: ring, Ulysses, hybrid, all-gather, halo.

Nothing is imported here: rules.py goes without torch.
"""
