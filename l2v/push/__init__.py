"""An encoder, its adapters or a data set with a card, and the way to the Hub."""
