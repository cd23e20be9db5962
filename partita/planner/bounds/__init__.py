"""Lower bounds of a plan's time and memory, from tables of blocks: each is at most what `simulate` says."""
