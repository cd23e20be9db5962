"""Import from the modules of this folder; calling the package calls partita.verify.parity.verify."""

from partita.base.callable import answers_calls

answers_calls(__name__, "partita.verify.parity")
