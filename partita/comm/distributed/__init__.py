"""Ranks by torch.distributed: gloo and nccl, and groups that span hosts by hierarchy."""
