"""Action masks: which tokens may come next."""
