"""Tables of published runs: their rows read, predicted, and held to what was measured."""
