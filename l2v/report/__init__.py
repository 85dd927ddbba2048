"""One page that says what runs learned, from what, how fast, and where they stand."""
