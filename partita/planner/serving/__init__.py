"""The search for a plan that serves."""
