"""Shared by the learners: pure functions of tensors, and the distributions, values and targets around them."""
