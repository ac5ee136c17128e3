"""Free photos that come with Debian packages, to train on."""
