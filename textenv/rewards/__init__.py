"""Rewards: reward models, functions, a library of ready-made functions, weighted sums, and score normalization."""
