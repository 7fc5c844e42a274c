"""Problem sets: read, written as token rows, compared, visited in a fixed order."""
