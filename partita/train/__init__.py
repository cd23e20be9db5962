"""Import from the modules of this folder; calling the package calls partita.train.launch.train."""

from partita.base.callable import answers_calls

answers_calls(__name__, "partita.train.launch")
