"""Benchmarks beside what a user would pick instead: `make bench`. Not tests."""
