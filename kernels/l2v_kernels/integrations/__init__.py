"""Thin adapters to other libraries. Nothing here is imported before it is asked for."""
