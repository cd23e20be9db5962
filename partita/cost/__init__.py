"""Seconds of kernels and collectives on a device."""
