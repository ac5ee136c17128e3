"""A decoder fine-tuned on a foreign domain, and what was trained on its old latents."""
