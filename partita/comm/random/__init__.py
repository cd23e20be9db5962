"""Randomness by counter: a value is a function of seed, name and index, on the CPU and the GPU."""
