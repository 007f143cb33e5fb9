"""The commands of the command line: each makes objects of names, and calls what does the work."""
