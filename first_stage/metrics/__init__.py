"""Figures of images, spectra, features, latents, and of the training itself."""
