"""The embedded task: product reviews, with everything that RLHF needs and something true to measure against."""
