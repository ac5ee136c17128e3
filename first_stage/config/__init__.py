"""The configuration of a run: its sections, their checks, and how it is read."""
