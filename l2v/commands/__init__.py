"""The verbs of `l2v`, one file each: parsing and printing only."""
