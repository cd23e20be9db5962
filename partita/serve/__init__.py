"""Inference from the plan line that a model was trained with: a runner of ranks, and what stands on it.

`piece.py` says what a runner is asked, `runner.py` opens one. `request.py` says what a client asks and gets,
`engine.py` answers many at once over a runner, by the steps of `core.py` and `scheduler.py`.
"""
