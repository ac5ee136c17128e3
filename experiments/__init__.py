"""Questions that were asked of the toolkit, each with its command and its table. Not installed."""
