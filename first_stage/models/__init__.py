"""The networks: the first stage behind one forward pass, and the patch critic."""
