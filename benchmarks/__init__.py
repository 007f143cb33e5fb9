"""What is measured and not tested: learning over seeds, speed and memory. Each writes JSON rows."""
