"""The axes, a folder each: rules.py (no torch) judges and lays a plan; the other files run it."""
