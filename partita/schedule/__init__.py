"""Pipeline schedules; `partita.schedule(name, ...)` makes one (see make)."""

from partita.base.callable import answers_calls

answers_calls(__name__, "partita.schedule.make")
