"""The full training step against other programs."""
