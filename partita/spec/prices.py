"""What a cluster costs to use: the optional table of a cluster file.

[prices]
device_hour = 2.5       money for a device and an hour
watts = 1100            what a device draws while a step runs, its share of host and network included
kwh = 0.12              money for a kilowatt hour, where energy is not in device_hour
currency = "USD"
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.base.errors import raise_all


@dataclass(frozen=True, slots=True)
class Prices:
    """Money and energy of devices. A plan pays for its ranks, for as long as they are held: idle in a bubble
    or not."""

    device_hour: float = 0.0
    watts: float = 0.0
    kwh: float = 0.0
    currency: str = "USD"

    def __post_init__(self) -> None:
        stated = {key: getattr(self, key) for key in ("device_hour", "watts", "kwh")}
        raise_all([(key, f"{value} is below 0") for key, value in stated.items() if value < 0])
        if not self.money_per_s and not self.watts:
            raise_all([("device_hour", "neither device_hour nor watts is above 0")])

    @property
    def money_per_s(self) -> float:
        """Of a device and a second."""
        return self.device_hour / 3600 + self.watts * self.kwh / 3.6e6
