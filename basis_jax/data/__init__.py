"""Problem sets: how they are read, encoded as tokens, compared and ordered."""
