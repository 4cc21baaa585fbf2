"""What the command line does. Each parses, calls and prints."""
