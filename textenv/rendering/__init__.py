"""Episodes as colored text and as images."""
