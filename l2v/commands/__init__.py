"""The command line: one module per verb of `l2v`, which parses and prints. The work is done in the verb's package."""
