"""`l2v quickstart`: the whole recipe on an embedded base and the Danish sample, scored on held-out questions."""
