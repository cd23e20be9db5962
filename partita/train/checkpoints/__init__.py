"""Checkpoints: saved by pieces, resumed under any plan, converted, exported, sampled from."""
