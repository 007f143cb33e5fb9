"""The embedded task, product reviews: all that RLHF needs, and a true quality to measure against."""
