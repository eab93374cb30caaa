"""Captions cut into words the way COCO's evaluation does it, without Java.

COCO's captioning numbers are computed on the output of Stanford's Penn Treebank tokenizer (CoreNLP 3.4.1, lower-cased)
less a list of punctuation marks. The rules here give the same words for ordinary English captions: contractions,
possessives, hyphens, numbers, abbreviations, quotes, brackets and currency signs. Emoticons, markup, web addresses and
dates with slashes are cut in simpler ways than there.
"""

import re

# A word with one of these keeps the full stop that follows it ...
_ABBREVIATIONS = (
    "mr mrs ms dr drs st mt sgt lt col gen prof sr jr rev gov sen rep pres capt cmdr hon inc ltd co cos corp bros assn "
    "dept univ ave blvd rd ft sq bldg ext tel est mfg intl natl etc vs al cf ph esq messrs maj adm supt pvt cpl det "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri "
    "ala ariz calif colo conn dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wyo"
).replace(" ", "|")
# ... these only with a capital, because they are words otherwise, and these only before a number: "no. 5".
_CAPITAL_ABBREVIATIONS = "Tex|Mass|Ill|La|Miss|Ore|Pa|Wash|Ark|Az|Del"
_NUMBER_ABBREVIATIONS = "no|nos|pp|fig|op|art|ca"
# After an initial, these begin a sentence, so that its full stop ends one: "plan B. The next".
_SENTENCE_STARTERS = "The|A|An|It|He|She|They|There|This|That|These|In|At|But|Some|One|We|You|What|Her"

_LETTER, _ALPHANUMERIC, _APOSTROPHE = r"[^\W\d_]", r"[^\W_]", r"['\u2019]"

_TOKEN = re.compile(
    rf"""
      (?i:ph\.d\.) | (?:{_LETTER}\.){{2,}}                                  # u.s., p.m.
    | {_LETTER}\.(?=$|[\s,)"”])(?!\s+(?:{_SENTENCE_STARTERS})\b)            # an initial: j. smith
    | (?i:{_ABBREVIATIONS})\.(?!{_ALPHANUMERIC})
    | (?:{_CAPITAL_ABBREVIATIONS})\.(?!{_ALPHANUMERIC})
    | (?i:{_NUMBER_ABBREVIATIONS})\.(?=\s*\d)
    | {_ALPHANUMERIC}+\.(?=,)
    | {_APOSTROPHE}(?:\d\ds?\b|(?i:em|n|cause|tis|twas)\b)                     # '90s, 'em
    | \d+(?::\d+)+                                                          # 10:30, also before pm
    | [+-]?(?:\d+(?:[.,]\d+)*|\.\d+)(?!{_ALPHANUMERIC}|[-/.:'\u2019]{_ALPHANUMERIC})
    | \d+(?:,\d+)+(?:[-/]{_ALPHANUMERIC}+)*                                 # 5,000-seat
    | (?:[#@]{_LETTER})?{_ALPHANUMERIC}+(?:(?:[-/.&@_]|{_APOSTROPHE}(?!\d)){_ALPHANUMERIC}+)*
    | \.+ | -+ | [!?]+ | \*+ | _+ | ``? | ''?
    | \S
    """,
    re.VERBOSE,
)
_CONTRACTION = re.compile(rf"(.*{_ALPHANUMERIC})(n{_APOSTROPHE}t|{_APOSTROPHE}(?:s|m|d|re|ve|ll))")
_FUSED = {
    "cannot": ["can", "not"],
    "gonna": ["gon", "na"],
    "wanna": ["wan", "na"],
    "gotta": ["got", "ta"],
    "gimme": ["gim", "me"],
    "lemme": ["lem", "me"],
    "'tis": ["'t", "is"],
    "'twas": ["'t", "was"],
}
# What the Treebank writes differently.
_REWRITTEN = {
    **dict(zip("()[]{}", ["-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"], strict=True)),
    **{"£": "#", "€": "$", "¢": "cents", "¼": "1/4", "½": "1/2", "¾": "3/4"},
}
# COCO's list; a run of dots or dashes is one mark of it, whereas "!!" and "?!" are not on it and stay.
_PUNCTUATION = re.compile(r"\.+|-+|[?!,:;'`\"«»\u2026\u2018\u2019\u201c\u201d\u2013\u2014]|``|''")


def tokenize_caption(caption: str) -> list[str]:
    """A caption's words in lower case, without punctuation marks; empty for a caption that has no word."""
    words: list[str] = []
    for token in _TOKEN.findall(caption):
        # The Java program reads 16 bits at a time and drops what does not fit, such as emoji.
        if _PUNCTUATION.fullmatch(token) or ord(token[0]) > 0xFFFF:
            continue
        words += _split_word(token.lower())
    return words


def _split_word(word: str) -> list[str]:
    """A word cut at its contractions: "he'd've" => he 'd 've."""
    if plain := _FUSED.get(word.replace("\u2019", "'")):
        return plain
    if found := _CONTRACTION.fullmatch(word):
        return [*_split_word(found[1]), found[2].replace("\u2019", "'")]
    return [_REWRITTEN.get(word, word)]
