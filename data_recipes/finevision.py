"""FineVision (`HuggingFaceM4/FineVision`): about 185 subsets of parquet files, rated turn by turn.

All ratings are stored; filtering by them is a setting of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from casa_train.data.sample import RATINGS
from data_recipes import published
from data_recipes.hub import chosen_subsets, image_bytes

HUB_ID = "HuggingFaceM4/FineVision"
TOKENIZER = "kyutai/helium-1-2b"
TEMPLATE = "helium"
COLUMNS = (
    "texts",
    "source",
    *(f"{name}_{kind}" for name in RATINGS for kind in ("ratings", "min")),
)

SUBSETS = tuple(
    """
a_okvqa aguvis-stage-1 ai2d_merged alfworldgpt allava_laion allava_vflan aokvqa art arxivqa
bentham blockdiagramcomputerized blockdiagramhandwritten cambrian(filtered)_processed captcha
chart2text chartqa chinesememe chrome_writting clevr clevr_math clevr_math(mathv360k)
coco_colors cocoqa cocotext CoSyn_400k_chart CoSyn_400k_chemical CoSyn_400k_circuit
CoSyn_400k_diagram CoSyn_400k_document CoSyn_400k_graphic CoSyn_400k_math CoSyn_400k_music
CoSyn_400k_nutrition CoSyn_400k_table ctw datik datikz densefusion_1m diagram_image_to_text
DoclingMatix docvqa drivelm dvqa est_vqa face_emotion figureqa figureqa(mathv360k) finqa funsd
geo170k(align) geo170k(qa) geo3k geometry3k(mathv360k) geomverse geoqa+(mathv360k)
geos(mathv360k) google_landmarks groundui handwriting_forms hateful_memes hitab hme100k hw_squad
iam iconqa iconqa(mathv360k) idk iiit5k image_textualization(filtered) imgur5k indoor_qa
infographic(gpt4v) infographic_vqa infographic_vqa_llava_format intergps invoices_receipts
k12_printing laion_gpt4v latex_handwritten latexformulas LLaVA_Instruct_150K llavar_gpt4_20k
lnqa localized_narratives lrv_chart lrv_normal(filtered) lvis_instruct4v mapqa mapqa(mathv360k)
maptext mathwriting-google mavis_math_metagen mavis_math_rule_geo memotion mimic_cgd
mmc_instruct mmevol mmra mmsoc_memotion multihiertt nlvr2 objects365_qa ocrvqa
olmOCR-mix-0225-books olmOCR-mix-0225-documents oodvqa orand_car_a pathvqa pdfvqa plotqa
pmc_vqa(mathv360k) raven rendered_text robut_sqa robut_wikisql robut_wtq scienceqa
scienceqa(nona_context) screen2words screenqa sharegpt4o sharegpt4v(coco) sharegpt4v(knowledge)
sharegpt4v(llava) sharegpt4v(sam) sketchyvqa slidevqa spark spatialsense spot_the_diff sroie
st_vqa sujet_finance super_clevr(mathv360k) svrd SynthChartNet SynthCodeNet synthdog
SynthFormulaNet tabmwp tabmwp(mathv360k) tal_ocr_eng tallyqa tat_dqa tat_qa text_code_feedback
text_codefeedback_filtered_instruction text_infinitymath text_mathinstruct text_mathqa
text_mathstepdpo10k text_numinamath_cot text_openhermes_2_5 text_OpenMathInstruct-2
text_openorca text_orcamath text_pythoncode25k text_pythoncodealpaca text_ruozhiba
text_theoremqa text_wizardlm_evol textcaps textocr(gpt4v) textvqa tqa Unichart unigeo(mathv360k)
ureader_cap ureader_ie ureader_kg_processed ureader_qa_processed vision_flan(filtered) vistext
visual7w visualmrc visualwebinstruct(filtered) vizwiz(mathv360k) vqaonbd vqarad vqav2 vsr
websight wildvision wordart yesbut
    """.split()
)
"""The subsets as published; the recipe asks the source itself, the full mixture names these."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    published.add_arguments(parser, HUB_ID, TOKENIZER, TEMPLATE)
    published.add_subset_argument(parser, "every subset of the source")


def run(arguments: argparse.Namespace) -> None:
    """Prepares the chosen subsets, one after the other."""
    subsets = chosen_subsets(arguments.source, arguments.subset, default=())
    published.prepare_parquet(arguments, "finevision", subsets, convert)


def convert(row: Mapping[str, Any], subset: str) -> tuple[dict[str, Any], list[bytes]]:
    """The stored columns of a row and its images, in order.

    :raises BadRow: images of which one is missing.
    """
    from casa_train.data.schemas.rows import BadRow

    images = row.get("images")
    if isinstance(images, Mapping | bytes):  # one image that is no list
        images = [images]
    if images is not None and not isinstance(images, list):
        raise BadRow("bad_images", f"column 'images' is {type(images).__name__}, expected a list")
    columns = {name: row[name] for name in COLUMNS if name in row}
    return columns, [image_bytes(image) for image in images or ()]
