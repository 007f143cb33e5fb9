"""The learners, one a file, and the dict of them by name in `registry`."""
