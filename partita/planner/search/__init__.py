"""Branch and bound over those bounds, and what is tried beyond it: splits, schedules made, offload."""
