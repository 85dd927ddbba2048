"""What this machine has, what runs on it and why the rest does not, and how fast it is."""
