"""A plan held to one device.

Calling the package calls partita.verify.parity.verify.
"""

from partita.base.callable import answers_calls

answers_calls(__name__, "partita.verify.parity")
