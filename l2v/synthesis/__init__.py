"""Queries for passages without any, written by a language model; used by `l2v data synthesize` only."""
