"""The kernels, and a layer made of them, against their peers; what their builds use."""
