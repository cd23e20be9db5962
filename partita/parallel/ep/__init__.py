"""Expert parallelism: router, dispatch by all-to-all, experts, combine.

Nothing is imported here: rules.py goes without torch.
"""
