"""The export: a plain diffusers folder with measured statistics, and its card."""
