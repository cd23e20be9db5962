"""The OpenAI-compatible server over an Engine: `create_app` (app.py), run by `partita serve`.

schema    what a request may hold          sampling      a request as SamplingParams
replies   an engine's streams, awaited     completions, chat, tokens   the routes
sse       how chunks go over the wire      tools         calls of functions in a model's text
health    alive, and a token end to end    metrics       what Prometheus reads
errors    one error object for all         gate          keys, and what is counted
"""
