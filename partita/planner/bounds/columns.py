"""Where each number of a block stands in its row of a table, and so in a stage's sum of rows (table.Cost)."""

from __future__ import annotations

TIMES, KEPT, READ, REST, EXPERTS = slice(0, 3), 3, 4, slice(5, 8), slice(8, 11)
UNITS, TRAVEL, LEAST, AWAY = slice(11, 15), 15, slice(16, 18), slice(18, 20)
STARTS, GROWS, SETS_OFF = slice(20, 25), slice(25, 30), 30
