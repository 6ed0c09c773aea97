"""Tells languages apart without a model: by the script of the letters, and by the most common words."""

import re
from collections import Counter

_LETTERS = re.compile(r"[^\W\d_]")
_WORDS = re.compile(r"[^\W\d_]+")

# Ranges of letters that (almost) only one language of the list uses. Japanese before Chinese: it has both.
_SCRIPTS = {
    "ja": re.compile("[\u3040-\u30ff]"),
    "zh": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"),
    "ko": re.compile("[\uac00-\ud7af\u1100-\u11ff]"),
    "ar": re.compile("[\u0600-\u06ff]"),
    "he": re.compile("[\u0590-\u05ff]"),
    "el": re.compile("[\u0370-\u03ff]"),
    "hi": re.compile("[\u0900-\u097f]"),
    "th": re.compile("[\u0e00-\u0e7f]"),
    "ru": re.compile("[\u0400-\u04ff]"),
}
# Common words that tell languages with Latin letters apart.
_STOP_WORDS = {
    "en": "the of and to in is that for it as with was on are be this by not or from at an have which you if can will",
    "de": "der die und in das den von zu mit sich ist des auf für nicht ein eine dem als auch es an werden aus er hat wird",
    "fr": "le la les de des et en un une du est que dans pour qui au pas sur par plus avec ce il sont ne se cette aux ou",
    "es": "el la los de y en que las del un una por con no se para es al lo como más su o este son sus entre ha fue",
    "it": "il di la e che in un per una del della è le dei con non da si nel alla sono al anche come ha più gli delle",
    "pt": "o a os de e do da em um que para uma com não no na é por mais dos as se ao como das foi mas seu ou pela",
    "nl": "de het een van en in is dat op te zijn met voor niet aan er die als bij ook om door naar uit maar wordt",
}
_SETS = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}
LANGUAGES = (*_SETS, *_SCRIPTS)
_LOOKED_AT = 20_000  # characters, which say enough


def detect(text: str) -> tuple[str, float]:
    """(language, how sure from 0 to 1); ("", 0.0) for text without letters.

    If another script makes up half of the letters (for Japanese, a tenth), the language is that of the script, and the
    score is the share of its letters. Otherwise it is the language whose common words are the largest share of the words;
    the score is that share over 0.25, at most 1, a level that running text passes and lists of names or code do not.
    """
    text = text[:_LOOKED_AT]
    letters = len(_LETTERS.findall(text))
    if not letters:
        return "", 0.0
    shares = {name: len(script.findall(text)) / letters for name, script in _SCRIPTS.items()}
    if shares["ja"] >= 0.1:
        return "ja", min(1.0, shares["ja"] + shares["zh"])
    best = max(shares, key=lambda name: shares[name])
    if shares[best] >= 0.5:
        return best, min(1.0, shares[best])
    words = Counter(_WORDS.findall(text.lower()))
    total = sum(words.values())
    common = {name: sum(words[word] for word in known) / total for name, known in _SETS.items()}
    best = max(common, key=lambda name: common[name])
    return (best, min(1.0, common[best] / 0.25)) if common[best] > 0 else ("", 0.0)
