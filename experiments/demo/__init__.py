"""What the demo's first stage does with the two photos that it never saw."""
