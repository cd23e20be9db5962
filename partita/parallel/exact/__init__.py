"""A laid plan run on all its ranks in exact arithmetic, integers modulo a prime, without torch."""
