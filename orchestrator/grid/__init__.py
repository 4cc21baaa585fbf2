"""From a file to the runs it plans."""
