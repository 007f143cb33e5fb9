"""ResponseBatch as text and as pictures."""
