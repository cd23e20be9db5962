"""What finds a dead rank: a line held to rank 0, and a roll call of who waits where."""
