"""Baselines for runs: learning from pairs without a rollout, and the best of n samples without learning."""
