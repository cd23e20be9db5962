"""Channels of a convolutional model on ranks that meet at chosen layers.

Nothing is imported here: rules.py goes without torch.
"""
