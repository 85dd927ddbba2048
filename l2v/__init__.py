"""l2v: decoder language models into Danish text encoders (LLM2Vec), fast."""

__version__ = "0.1.0"
__all__ = ["Encoder"]


def __getattr__(name: str):
    # Lazy, so that the command line reports a wrong recipe without loading torch first.
    if name == "Encoder":
        from l2v.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'l2v' has no attribute '{name}'")
