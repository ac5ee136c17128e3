"""Quantizers side by side: same photos, same network, same number of images."""
