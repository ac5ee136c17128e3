"""What the decoder's padding is worth at the border of an image, and what the wrong one costs."""
