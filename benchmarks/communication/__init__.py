"""What ranks send each other: counted, and predicted."""
