"""Collectives and messages of ranks: threads, shared memory, gloo, nccl; what finds a dead rank."""
