"""Prompts: their sources, their tokens, the order in which they are played, and the choice of one at reset."""
