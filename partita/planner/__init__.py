"""The search for the best plan: its space here, then bounds/, search/ over them, answers/ about plans."""
