"""Encode Danish sentences and find those that lie nearest to a question. The argument is a base, a run or an export."""

import sys

from l2v import Encoder

TEXTS = [
    "Skagen er Danmarks nordligste by.",
    "Rugbrød bages af rugmel og surdej.",
    "Færgen til Samsø sejler fra Hou.",
    "Husk at slukke lyset, når du går.",
]
QUESTION = "Hvordan kommer man til Samsø?"

encoder = Encoder.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct")
vectors = encoder.encode(TEXTS)
print(vectors.shape, vectors.dtype)
scores = vectors @ encoder.encode(QUESTION)
for at in (-scores).argsort():
    print(f"{scores[at]:.3f}  {TEXTS[at]}")
