"""Schedules made from costs and a memory limit: list scheduling, justification, search, exact proof."""
