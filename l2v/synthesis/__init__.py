"""Queries for passages that have none, written by a language model; nothing of it runs unless it is asked for."""
