"""Pipeline parallelism: the executor of a schedule, its deferred weight gradients, weight versions.

Nothing is imported here: rules.py goes without torch.
"""
