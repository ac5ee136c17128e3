"""Objectives side by side: same photos, same first stage, same number of images."""
