"""One page a run: what was predicted beside what happened."""
