"""Report what this machine has, which features run on it and why others do not, and how fast it is."""
