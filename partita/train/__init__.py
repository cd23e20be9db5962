"""A run: the step, the loop, and in folders its data, optimizer, checkpoints and launch.

Calling the package calls partita.train.launch.launcher.train.
"""

from partita.base.callable import answers_calls

answers_calls(__name__, "partita.train.launch.launcher")
