"""Exports in other engines: written as an adapter, and verified."""
