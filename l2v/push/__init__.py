"""Publish an encoder, its adapters or a data set with a card on the Hub."""
