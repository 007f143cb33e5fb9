"""Episodes as text and as pictures."""
