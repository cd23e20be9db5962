"""Precision: the dtype of each role, loss scaling, fp8.

Nothing is imported here: rules.py goes without torch.
"""
