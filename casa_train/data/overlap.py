"""Which published subsets hold the same samples, so that no mixture counts them twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import combinations

from casa_train.errors import UserError

LACKING_IN_FINEVISION = (
    "OmniDocBench_train",
    "allenai_pixmo_docs",
    "amc_aime",
    "aops_forum",
    "arxiv_figs",
    "diagram",
    "gqa",
    "infographic_azuregpt4v",
    "invoices-and-receipts_ocr",
    "latex_ocr",
    "llava_cot_100k",
    "llava_wild",
    "llrv_gpt4v",
    "olympiads",
    "oroikon_chart_captioning",
    "rootsautomation",
    "sherlock",
    "svit",
    "tinychart_train",
    "ureader_chart",
    "ureader_ocr",
    "ureader_tr",
    "viquae",
    "vision_oritented",
    "visual_chat",
    "wit",
)
"""Subsets of LLaVA-OneVision-1.5-Instruct that FineVision does not have, under the names that
the dataset gives them."""

# Subset of LLaVA-OneVision-1.5-Instruct -> where FineVision has it; where the names differ only in
# case, signs or a suffix in brackets, `_plain` finds it.
IN_FINEVISION = {
    "CLEVR-Math": ("clevr_math", "clevr_math(mathv360k)"),
    "Docmatix": ("DoclingMatix",),
    "Evol-Instruct-GPT4-Turbo": ("text_wizardlm_evol",),
    "ai2d": ("ai2d_merged",),
    "alfworld": ("alfworldgpt",),
    "allava": ("allava_laion", "allava_vflan"),
    "allava_instruct_laion4v": ("allava_laion",),
    "allava_instruct_vflan4v": ("allava_vflan",),
    "aokvqa": ("aokvqa", "a_okvqa"),
    "cambrian": ("cambrian(filtered)_processed",),
    "code_feedback_66k": ("text_code_feedback",),
    "docvqa_train": ("docvqa",),
    "geo170k_align": ("geo170k(align)",),
    "geo170k_qa": ("geo170k(qa)",),
    "gpt4o": ("sharegpt4o",),
    "gpt4v": ("laion_gpt4v",),
    "iiit": ("iiit5k",),
    "infographic_vqa": ("infographic_vqa", "infographic_vqa_llava_format"),
    "llava_instruct": ("LLaVA_Instruct_150K",),
    "llavar": ("llavar_gpt4_20k",),
    "mathinstruct_262k": ("text_mathinstruct",),
    "mathqa": ("text_mathqa",),
    "open_orca": ("text_openorca",),
    "openmathinstruct": ("text_OpenMathInstruct-2",),
    "orca_994k": ("text_openorca",),
    "sharegpt4v": (
        "sharegpt4v(coco)",
        "sharegpt4v(knowledge)",
        "sharegpt4v(llava)",
        "sharegpt4v(sam)",
    ),
    "sroie_data": ("sroie",),
    "textocr_gpt4v": ("textocr(gpt4v)",),
    "ureader_kg": ("ureader_kg_processed",),
    "ureader_qa": ("ureader_qa_processed",),
    "vflan": ("vision_flan(filtered)", "allava_vflan"),
    "wizardlm": ("text_wizardlm_evol",),
}


def refuse_double_counting(origins: Mapping[str, tuple[str, str]]) -> None:
    """Checks a choice of subsets.

    :param origins: name to complain about -> (dataset, subset).
    :raises UserError: two of them hold the same samples; names both.
    """
    found = [
        f"{one} ({' '.join(origins[one])}) and {other} ({' '.join(origins[other])}): {why}"
        for one, other in combinations(origins, 2)
        for why in _same(origins[one], origins[other])
    ]
    if found:
        shown = "; ".join(found[:5]) + ("; ..." if len(found) > 5 else "")
        raise UserError(
            f"the same samples would count twice: {shown}. Keep one of each and use `repeats` "
            "where a source is to be seen more often."
        )


def _same(one: tuple[str, str], other: tuple[str, str]) -> Iterator[str]:
    """Why two subsets hold the same samples; nothing where they do not."""
    if one == other:
        yield "the same subset"
    elif one[0] == other[0]:
        (whole_one, part_one), (whole_other, part_other) = _part(one[1]), _part(other[1])
        if whole_one == whole_other and None in (part_one, part_other):
            yield "a whole subset and a part of it"
        elif whole_one == whole_other and part_one == part_other:
            yield "the same part under two names"
    elif {one[0], other[0]} == {"finevision", "llava_onevision"}:
        onevision, fine = sorted((one, other), reverse=True)
        whole = _part(onevision[1])[0]
        same_name = whole not in LACKING_IN_FINEVISION and _plain(whole) == _plain(fine[1])
        if same_name or fine[1] in IN_FINEVISION.get(whole, ()):
            yield "both datasets have it"


def _part(subset: str) -> tuple[str, str | None]:
    """("svit", "03") of "svit-part-03-of-10"; ("svit", None) of "svit"."""
    match = re.fullmatch(r"(.+?)-part-?(\d+)-of-\d+", subset)
    return (match[1], match[2]) if match else (subset, None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*\)", "", name.lower()))
