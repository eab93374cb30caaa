"""Captions split into words as in COCO's evaluation: by its Java program, or without Java by similar rules.

COCO's captioning numbers are computed on the output of Stanford's Penn Treebank tokenizer (CoreNLP 3.4.1, lower-cased)
less a list of punctuation marks. The rules here were found by comparing with that program on real sentences. As there,
at each place the rule that reaches furthest wins, and of equals the first.
"""

import logging
import re
import subprocess
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transfusion_mot.evaluation.captions.java import JavaMissing, find_jar, find_java

# A word with one of these keeps the full stop that follows it ...
_ABBREVIATIONS = (
    "mr mrs ms dr drs st mt sgt lt col gen prof sr jr rev gov sen rep pres capt cmdr hon inc ltd co cos corp bros assn "
    "brig lieut wm sys adj asst spc pfc cie invt elec rt "
    "dept univ ave blvd rd ft sq bldg ext tel est mfg intl natl etc vs v al cf ph esq messrs maj adm supt pvt cpl det "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri "
    "ala ariz calif colo conn dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wyo"
).replace(" ", "|")
# ... these only with a capital, because they are words otherwise, and these only before a number: "no. 5".
_CAPITAL_ABBREVIATIONS = "Tex|Mass|Ill|La|Miss|Ore|Pa|Wash|Ark|Az|Del"
_NUMBER_ABBREVIATIONS = "no|nos|p|pp|fig|figs|op|art|ca"
# These words begin a sentence, so a full stop before them ends one, even after an initial: "plan B. The next".
_SENTENCE_STARTERS = "The|A|An|It|He|She|They|There|This|That|These|In|At|But|Some|One|We|You|What|Her"

# Combining marks of these ranges are parts of words.
_JOINING = (
    *((0x300, 0x5C7), (0x615, 0x65E), (0x670, 0x7F3), (0x900, 0x903), (0x93C, 0x94E), (0x951, 0x955), (0x962, 0x9E3)),
    *((0xA01, 0xA4D), (0xA81, 0xACD), (0xB82, 0xBCD), (0xC01, 0xC03), (0xC3E, 0xC56), (0xD3E, 0xD48), (0xE31, 0xECD)),
    (0x1885, 0x1886),
)
_MARKS = "".join(
    chr(code)
    for low, high in _JOINING
    for code in range(low, high + 1)
    if unicodedata.category(chr(code)) in ("Mn", "Mc")
)
# The program drops other marks, and characters of these categories: control, format (BOM, joiners), Roman numerals.
_DROPPED_CATEGORIES = frozenset({"Cc", "Cf", "Nl", "Mn", "Mc", "Me"})

_FRACTION = r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2153\u2154"
_LETTER, _ALNUM = rf"(?:[^\W\d_{_FRACTION}]|[{_MARKS}])", rf"(?:[^\W_{_FRACTION}]|[{_MARKS}])"
_APOSTROPHE = r"['\u2019]"
_ENDING = rf"(?i:n{_APOSTROPHE}t|'(?:s|m|d|re|ve|ll)(?!{_LETTER})|\u2019(?:s|m|d|re|ve|ll))"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_URL = r"[^\s\"<>|()]"
_HOST = r"(?:[^\s\"'`<>|.!?(){},\-$]+\.)+"
_MAIL = r"[^\s\"<>|(){}.]"


class _Rule(NamedTuple):
    """Pattern of a token, and of the text that must follow it, which counts for the length of the match."""

    token: re.Pattern[str]
    followed_by: re.Pattern[str] | None = None


def _rule(token: str, followed_by: str | None = None) -> _Rule:
    return _Rule(re.compile(token), None if followed_by is None else re.compile(followed_by))


_RULES = (
    # Markup, addresses.
    _rule(r"<[/!?]?[A-Za-z][A-Za-z0-9]*(?: [A-Za-z][\w:.-]*(?:=(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s<>\"']+))?)* ?[/?]?>"),
    _rule(r"<!--[^>]*-->"),
    _rule(r"&(?i:lt|gt|amp|quot|apos|nbsp|mdash|ndash|#\d+);"),
    _rule(rf"<?[A-Za-z0-9][^\s\"<>|(){{}}@]*@(?:{_MAIL}+\.)*{_MAIL}+>?"),
    _rule(rf"(?i:https?)://{_URL}+[^\s\"<>|.!?(){{}},\-]"),
    _rule(rf"(?:www\.{_HOST}[A-Za-z]{{2,4}}|{_HOST}(?:com|net|org|edu))(?:/{_URL}+[^\s\"<>|.!?(){{}},\-])?"),
    _rule(r"#[A-Za-z][A-Za-z0-9]*|@[A-Za-z_][A-Za-z0-9_]*"),
    # Words, and endings that are split off.
    _rule(r"(?i:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b)|'t(?=is\b|was\b))", r"\w+"),
    _rule(rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"),
    _rule(rf"{_ALNUM}+?(?={_ENDING})", _ENDING),
    _rule(_ENDING),
    _rule(rf"{_APOSTROPHE}n(?:{_APOSTROPHE}|(?!{_LETTER}))|{_APOSTROPHE}(?i:em|till?|cause)(?!{_LETTER})"),
    _rule(rf"{_APOSTROPHE}[2-9]0s|{_APOSTROPHE}\d\d(?!{_ALNUM})"),
    _rule(rf"(?i:[ldj]){_APOSTROPHE}|[yY]{_APOSTROPHE}(?={_LETTER})|(?i:ol|dunkin|somethin)'"),
    _rule(rf"(?:[A-HJ-XZn]|[dDlLoO]){_APOSTROPHE}{_LETTER}{{2,}}"),
    _rule(rf"{_LETTER}+[aeiouyAEIOUY]{_APOSTROPHE}[aeiouA-Z]{_LETTER}*"),
    _rule(r"(?i:c'mon|e'er|ev'ry|li'l|nat'l|nor'easter|s'mores)"),
    _rule(r"[A-Z]+(?:&[A-Z]+)+"),
    _rule(rf"{_ALNUM}+(?:_{_ALNUM}+)*"),
    _rule(rf"{_ALNUM}(?:{_ALNUM}|[.,])*(?:[-\u2010\u2011]{_ALNUM}+)+"),
    _rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    # Numbers.
    _rule(rf"[+-]?{_NUMBER}"),
    _rule(r"(?:\d{1,4}[- ])?\d{1,4}\\?/\d{1,4}"),
    _rule(r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
    _rule(r"(?:\(\d{2,3}\)[ ]?|(?:\+\+?)?(?:\d{2,4}[- ])?\d{2,4}[- /])\d{3,4}[- ]?\d{3,5}|\d{4}[- ]?\d{4}(?!\d)"),
    # Full stops that belong to what is before them.
    _rule(r"(?:[A-Za-z]\.){2,}|(?i:ph\.d\.)"),
    _rule(rf"[A-Za-z]\.(?!\s+(?:{_SENTENCE_STARTERS})(?:\s|$))(?!{_LETTER})"),
    _rule(rf"(?i:{_ABBREVIATIONS})\.(?!{_ALNUM})"),
    _rule(rf"(?:{_CAPITAL_ABBREVIATIONS})\.(?!{_ALNUM})"),
    _rule(rf"(?i:{_NUMBER_ABBREVIATIONS})\.", r"\s*\d"),
    _rule(rf"{_ALNUM}+\.(?=[,;:])"),
    # Faces.
    _rule(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])"),
    _rule(r"[-^x=~<>']_[-^x=~<>']|[oO]_[oO]|[\^x=~<>]\.[\^x=~<>]"),
    # Marks.
    _rule(r"(?:US|A|C|NT|AU|HK)\$"),
    _rule(r"(?i:c)\+\+|[cCfF]#|>>|<<|[!?]+|\*+|_+|#+|-{5,}|-{1,4}|\.\.\.+|\. \. \."),
    _rule(r"``?|''|[\u2018\u201c\u00ab\u2039]+|[\u2019\u201d\u00bb\u203a]+"),
    _rule(r"."),
)
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=\s)")
_FUSED = frozenset({"cannot", "gonna", "wanna", "gotta", "gimme", "lemme"})
# Characters that the Treebank writes differently.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = {"\u2018": "`", "\u201c": "``", "\u00ab": "``", "\u2039": "`"}
_QUOTES |= {"\u2019": "'", "\u201d": "''", "\u00bb": "''", "\u203a": "'"}
_REWRITTEN = {
    **_BRACKETS,
    **{"£": "#", "€": "$", "¢": "cents", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
    **{"&lt;": "<", "&gt;": ">", "&amp;": "&"},
}
# COCO's list; a run of dots or dashes is one mark of it, whereas "!!" and "?!" are not on it and stay.
_PUNCTUATION = re.compile(
    r"\.+|\. \. \.|-{1,4}|[?!,:;'`\"\u00ab\u00bb\u2039\u203a\u2026\u2018\u2019\u201c\u201d\u2013\u2014]|``|''"
    r"|\u2018\u2018|\u2019\u2019|&(?i:quot|apos|nbsp|[mn]dash);"
)
# What COCO's evaluation removes from the program's output.
_REMOVED = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--"))
_REMOVED |= {"...", ";"}
_LINE_ENDS = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")

_logger = logging.getLogger(__name__)


def tokenize_captions(*lists: Sequence[str]) -> tuple[list[list[list[str]]], str]:
    """Words of each caption of some lists, as in COCO's evaluation, and the name of the tokenizer.

    The tokenizer is the Java program if Java and pycocoevalcap are installed, else `tokenize_caption`. A mixed fraction
    or a telephone number is one word with no-break spaces inside.
    """
    try:
        return [_by_java(captions) for captions in lists], "PTBTokenizer of CoreNLP 3.4.1"
    except JavaMissing as missing:
        _logger.info("captions are split into words by rules similar to COCO's program: %s", missing)
        return [
            [tokenize_caption(caption) for caption in captions] for captions in lists
        ], "PTB rules of transfusion_mot"


def _by_java(captions: Sequence[str]) -> list[list[str]]:
    jar = find_jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    command = [find_java(), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions"
        lines = "".join(_LINE_ENDS.sub(" ", caption) + "\n" for caption in captions)
        # JSON may contain halves of surrogate pairs, which UTF-8 cannot encode.
        file.write_text(lines, encoding="utf-8", errors="replace")
        # The default encoding of the program is that of the machine.
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(file)],
            capture_output=True,
            encoding="utf-8",
        )
    found = done.stdout.split("\n")[:-1]
    if done.returncode or len(found) != len(captions):
        raise JavaMissing(f"its program gave {len(found)} lines for {len(captions)} captions: {done.stderr[-200:]}")
    return [[word for word in line.rstrip().split(" ") if word and word not in _REMOVED] for line in found]


def tokenize_caption(caption: str) -> list[str]:
    """A caption's words in lower case, without punctuation marks; empty for a caption that has no word."""
    # The Java program reads 16 bits at a time and drops what does not fit, such as emoji.
    text = re.sub(r"[^\x00-\uffff]", " ", " ".join(caption.split()).replace("\u00ad", ""))
    if not text.isascii():
        text = "".join(" " if _is_dropped(character) else character for character in text)
    words: list[str] = []
    place = 0
    while place < len(text):
        if text[place] == " ":
            place += 1
            continue
        plain = _PLAIN_WORD.match(text, place)
        if plain is not None and plain[0].lower() not in _FUSED:
            words.append(plain[0].lower())
            place = plain.end()
            continue
        end = _token_end(text, place)
        token = text[place:end]
        place = end
        if not _PUNCTUATION.fullmatch(token):
            words.append(_written(token.lower()))
    return words


def _is_dropped(character: str) -> bool:
    return unicodedata.category(character) in _DROPPED_CATEGORIES and character not in _MARKS


def _token_end(text: str, place: int) -> int:
    """End of the token that begins at `place`."""
    best = reach = place
    for rule in _RULES:
        found = rule.token.match(text, place)
        if found is None:
            continue
        reached = found.end()
        if rule.followed_by is not None:
            following = rule.followed_by.match(text, found.end())
            if following is None:
                continue
            reached = following.end()
        if reached > reach:
            best, reach = found.end(), reached
    return best


def _written(token: str) -> str:
    """A token as the program writes it, in lower case."""
    if token in _REWRITTEN:
        return _REWRITTEN[token]
    if set(token) <= set(_QUOTES):
        return "".join(_QUOTES[mark] for mark in token)
    if re.fullmatch(_ENDING, token):
        return token.replace("\u2019", "'")
    if len(token) > 1 and token[0] in "<>:;=" and token[-1] in "()":
        # A face.
        return token[:-1] + _BRACKETS[token[-1]]
    if token[0] == "(":
        # A telephone number.
        token = token.replace("(", _BRACKETS["("]).replace(")", _BRACKETS[")"])
    # Spaces inside a token would cut it in two.
    return token.replace(" ", "\u00a0")
