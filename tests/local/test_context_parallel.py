"""Context parallelism: what a query sees, how tiles are merged, what travels."""

import torch

from partita.parallel.cp.visible import Tokens, visible


def test_what_a_query_sees_by_hand():
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    tokens = Tokens.first(8, documents)
    seen = visible(tokens.part(3, 8), tokens, window=3)[0]
    rows = [row.nonzero().flatten().tolist() for row in seen]
    assert rows == [[1, 2, 3], [2, 3, 4], [5], [5, 6], [5, 6, 7]]
    both = visible(tokens.part(5, 8), tokens, window=2, causal=False)[0]
    assert [row.nonzero().flatten().tolist() for row in both] == [[5, 6], [5, 6, 7], [6, 7]]
