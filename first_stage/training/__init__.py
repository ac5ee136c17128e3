"""A training run: the loop, the step, and what a run keeps in its folder."""
