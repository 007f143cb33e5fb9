"""Measurements that are not tests: learning over seeds, speed and memory. Each module writes JSON rows."""
