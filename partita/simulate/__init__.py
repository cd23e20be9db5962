"""A step before it runs: time, memory, traffic.

Calling the package calls partita.simulate.predict.simulate.
"""

from partita.base.callable import answers_calls

answers_calls(__name__, "partita.simulate.predict")
