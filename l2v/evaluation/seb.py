"""The twelve Danish tasks of the Scandinavian Embedding Benchmark (SEB, arXiv 2406.02396), with their names in mteb and in SEB.

A leaf of the import tree: names only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SebTask:
    """One task: its name in mteb, in SEB's results, as a column heading, and which cell of mteb's result is SEB's score.

    subset, split: SEB scores the first evaluation split of mteb 1.1.1, and only Danish. For MASSIVE that is `validation`.
    """

    name: str
    seb: str
    column: str
    type: str
    metric: str
    subset: str = "default"
    split: str = "test"

    @property
    def file(self) -> str:
        """The name of its result file in the `seb` package."""
        return self.seb.replace(" ", "_") + ".json"


_C, _R = ("Classification", "accuracy"), ("Retrieval", "ndcg_at_10")
SEB_DA = (
    SebTask("AngryTweetsClassification", "Angry Tweets", "Tweets", *_C),
    SebTask("BornholmBitextMining", "Bornholm Parallel", "Bornholm", "BitextMining", "f1"),
    SebTask("DKHateClassification", "DKHate", "DKHate", *_C),
    SebTask("DanishPoliticalCommentsClassification", "Da Political Comments", "Political", *_C, split="train"),
    SebTask("DanFeverRetrieval", "DanFEVER", "DanFEVER", *_R, split="train"),
    SebTask("LccSentimentClassification", "LCC", "LCC", *_C),
    SebTask("NordicLangClassification", "Language Identification", "Language", *_C),
    SebTask("MassiveIntentClassification", "Massive Intent", "Intent", *_C, subset="da", split="validation"),
    SebTask("MassiveScenarioClassification", "Massive Scenario", "Scenario", *_C, subset="da", split="validation"),
    SebTask("ScalaClassification", "ScaLA", "ScaLA", *_C, subset="Danish"),
    SebTask("TV2Nordretrieval", "TV2Nord Retrieval", "TV2Nord", *_R),
    SebTask("TwitterHjerneRetrieval", "Twitterhjerne", "Twitter", *_R, split="train"),
)
BY_NAME = {task.name: task for task in SEB_DA}
