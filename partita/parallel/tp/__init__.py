"""Tensor parallelism: heads, ffn columns and the vocabulary cut.

Nothing is imported here: rules.py goes without torch.
"""
