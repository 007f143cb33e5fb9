"""Rewards: models, functions, ready-made ones and sums of them, and what is paid of a score."""
