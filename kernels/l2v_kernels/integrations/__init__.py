"""Thin adapters to other libraries, imported only on request."""
