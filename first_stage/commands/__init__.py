"""The commands: each parses, calls, and prints what was made and what comes next."""
