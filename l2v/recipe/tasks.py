"""Every instruction that l2v has: by kind of task for training, and by task of SEB for evaluation. A leaf of the import tree.

`task: NAME` of a source, `l2v encode --task` and `l2v eval --prompts` all read these.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from l2v.errors import RecipeError


@dataclass(frozen=True)
class Task:
    """Instruction of the query, instruction of the document (None for none), and whether the two may be exchanged."""

    query: str
    document: str | None = None
    symmetric: bool = False


# A document has no instruction: it is embedded once and compared with queries of every kind.
TASKS: dict[str, Task] = {
    "search-da": Task("Find tekster, der er relevante for søgningen:"),
    "question-da": Task("Find den tekst, der besvarer spørgsmålet:"),
    "keywords-da": Task("Find den tekst, som søgeordene peger på:"),
    "forum-da": Task("Find et godt svar på indlægget:"),
    "debate-da": Task("Find svaret på indlægget i debatten:"),
    "title-da": Task("Find den tekst, som overskriften hører til:"),
    "summary-da": Task("Find den tekst, som resuméet gengiver:"),
    "claim-da": Task("Find tekster, der be- eller afkræfter påstanden:"),
    "same-meaning-da": Task("Find en sætning med samme betydning:", symmetric=True),
    "same-question-da": Task("Find et spørgsmål, der spørger om det samme:", symmetric=True),
    "translation-da": Task("Find den samme sætning på et andet sprog:", symmetric=True),
    "same-topic-da": Task("Find en tekst om det samme emne:", symmetric=True),
    "same-sentiment-da": Task("Find en tekst med samme holdning:", symmetric=True),
}


# What evaluation puts before the texts of SEB's Danish tasks: the words of training for a kind of task that training has.
EVALUATED: dict[str, str] = {
    "AngryTweetsClassification": "same-sentiment-da",
    "BornholmBitextMining": "translation-da",
    "DanFeverRetrieval": "claim-da",
    "DanishPoliticalCommentsClassification": "same-sentiment-da",
    "LccSentimentClassification": "same-sentiment-da",
    "MassiveScenarioClassification": "same-topic-da",
    "TV2Nordretrieval": "summary-da",
    "TwitterHjerneRetrieval": "question-da",
}
DANISH = {task: TASKS[kind].query for task, kind in EVALUATED.items()} | {
    "DKHateClassification": "Afgør, om tweetet er stødende eller ej:",
    "NordicLangClassification": "Afgør, hvilket nordisk sprog teksten er skrevet på:",
    "MassiveIntentClassification": "Afgør, hvad taleren vil have stemmeassistenten til at gøre:",
    "ScalaClassification": "Afgør, om sætningen er grammatisk korrekt:",
}
ENGLISH = {
    "AngryTweetsClassification": "Tell the sentiment of the Danish tweet: positive, neutral or negative",
    "BornholmBitextMining": "Find the sentence with the same meaning in Danish or in the dialect of Bornholm",
    "DKHateClassification": "Tell whether the Danish tweet is offensive or not",
    "DanishPoliticalCommentsClassification": "Tell the sentiment of the Danish political comment",
    "DanFeverRetrieval": "Given a claim in Danish, find the text that supports it",
    "LccSentimentClassification": "Tell the sentiment of the Danish text: positive, neutral or negative",
    "NordicLangClassification": "Tell in which Nordic language the text is written",
    "MassiveIntentClassification": "Tell what the speaker wants the voice assistant to do",
    "MassiveScenarioClassification": "Tell which scenario the request to the voice assistant belongs to",
    "ScalaClassification": "Tell whether the sentence is grammatically correct",
    "TV2Nordretrieval": "Given the summary of a Danish news article, find the article",
    "TwitterHjerneRetrieval": "Given a question from a Danish tweet, find tweets that answer it",
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        RecipeError: if it does not exist; the message gives the nearest name.
    """
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.6)
    raise RecipeError(
        f"no task '{name}'; " + (f"did you mean '{close[0]}'?" if close else f"known: {', '.join(TASKS)}")
    )
