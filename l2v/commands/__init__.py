"""The command line: one module a verb of `l2v`, which parses and prints. What a verb does lives in its package."""
