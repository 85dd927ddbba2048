"""Check a set of passages and questions: duplicates, leaks, spelling, balance."""
