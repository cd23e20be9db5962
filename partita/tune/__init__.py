"""Measures this machine, and the real ranks before they train."""
