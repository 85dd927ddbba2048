"""`l2v train RECIPE [--stage NAME] [key=value ...]`: the training program, which `deepspeed --module l2v.train` also runs."""

from l2v.train import main, parser

__all__ = ["main", "parser"]
