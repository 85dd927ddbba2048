"""An export in the formats of other runtimes: ONNX and GGUF, each checked against the Encoder before it is kept."""
