"""Exports in other engines: verified, written as an adapter, and served over HTTP with OpenAI's interface."""
