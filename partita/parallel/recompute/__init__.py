"""Recomputation of activations, by module and layer.

Nothing is imported here: rules.py goes without torch.
"""
