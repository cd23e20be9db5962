"""Where the program begins: a stop is one line from the first moment on, while all that it needs still loads.

Nothing is imported above that is not there anyway; `partita/cli/main.py` takes the signals over.
"""

from __future__ import annotations

import os
import signal
import sys

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def main() -> None:
    """The console script."""
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as shells have it for what runs behind
            signal.signal(number, _leave)
    from partita.cli.main import main as line

    line()


def _leave(number: int, _: object) -> None:
    """Nothing is begun, so nothing is cleared away. Raised here, what loads would tell of it."""
    told = f"stopped by {NAMES[signal.Signals(number)]}"
    if "--json" in sys.argv and os.environ.get("RANK", "0") == "0":  # of torchrun's ranks the first
        error = f'{{"kind": "stopped", "message": "{told}", "file": null, "key": null}}'
        os.write(1, f'{{"format": 1, "error": {error}}}\n'.encode())
    os.write(2, f"partita: {told}\n".encode())
    os._exit(128 + number)
