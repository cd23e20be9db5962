"""What serving a plan costs: memory, time of a step, tokens a second."""
