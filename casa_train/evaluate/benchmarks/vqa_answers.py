"""Short answers as the VQA challenge compares them."""

from __future__ import annotations

import re

NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS_AT_MOST = 32
"""So many are removed: the challenge's code passes a flag where the count stands."""

CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've "
    "should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've "
    "you'd you'd've you'll you're you've"
).split()
WITH_APOSTROPHES = {
    word[:at] + word[at + 1 :]: word
    for word in CONTRACTIONS
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction that lacks one of its apostrophes -> the contraction; one entry of the challenge's
own goes the other way.
"""


def vqa_normalised(answer: str) -> str:
    """An answer in small letters without articles and punctuation, its small numbers as digits and
    its contractions with their apostrophes.

    Punctuation with a space at its side anywhere in the answer goes, other becomes a space.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    beside_space = {mark for mark in PUNCTUATION if mark + " " in text or " " + mark in text}
    text = text.translate({ord(m): "" if m in beside_space else " " for m in PUNCTUATION})
    text = FULL_STOP.sub("", text, count=FULL_STOPS_AT_MOST)
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(WITH_APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)
