"""Exports as models of the real lmms-eval, on tasks with a tiny data set.

`make test-lmms` has the environment; the ordinary one has no lmms-eval, and skips.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from tests.helpers.commands import environment
from tests.helpers.once import once
from tests.helpers.tiny_export import write_tiny_export

if os.environ.get("CI_REQUIRED") != "1":
    pytest.importorskip("lmms_eval", reason="`make test-lmms` has lmms-eval")

import lmms_eval  # noqa: E402
import lmms_eval.models  # noqa: E402
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from lmms_eval.utils import load_yaml_config  # noqa: E402

from casa_train.evaluate.lmms.adapter import CasaChat, CasaSimple  # noqa: E402
from casa_train.evaluate.lmms.keywords import read_keywords  # noqa: E402
from tests.helpers.lmms_tasks import (  # noqa: E402
    CHOICES,
    MAX_NEW_TOKENS,
    picture,
    write_tasks,
)

DOCUMENTS = 7
IMAGE_SIZE = 70  # smaller than the export's own


# -------------------------------------------------------------------------------- the export itself


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "lmms_export", write_tiny_export)


class Direct:
    """An export as its users load it, asked one conversation at a time."""

    def __init__(self, export: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(
            export, trust_remote_code=True, image_size=IMAGE_SIZE
        )
        self.model = AutoModel.from_pretrained(export, trust_remote_code=True).eval()

    def answer(self, content: Sequence[Any], tokens: int = MAX_NEW_TOKENS, system: str = "") -> str:
        messages = [{"role": "user", "content": list(content)}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        batch = self.processor.tokenize_messages(messages)
        out = self.model.generate_from_image(**batch, max_new_tokens=tokens, do_sample=False)
        new = out[0, batch["input_ids"].shape[1] :]
        return str(self.processor.decode(new, skip_special_tokens=True)).strip()

    @torch.no_grad()
    def log_likelihood(self, content: Sequence[Any], continuation: str) -> tuple[float, bool]:
        """From a forward pass in float64 over the ids of an answer without its end."""
        asked = [{"role": "user", "content": list(content)}]
        start = self.processor.tokenize_messages(asked)["input_ids"].shape[1]
        said = [*asked, {"role": "assistant", "content": continuation}]
        batch = self.processor.tokenize_messages(said)
        logits = self.model.double()(**batch).logits[0].log_softmax(-1)
        self.model.float()
        ids = batch["input_ids"][0]
        end = len(ids) - len(self.processor.asst_end_tokens)
        rows = logits[start - 1 : end - 1]
        found = rows[torch.arange(end - start), ids[start:end]]
        return float(found.sum()), bool((rows.argmax(-1) == ids[start:end]).all())


@pytest.fixture(scope="module")
def direct(export: Path) -> Direct:
    return Direct(export)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(shown: Any) -> dict[str, Any]:
    return {"type": "image", "image": shown}


def question(number: int) -> dict[str, Any]:
    return text("What is" + " really" * (number % 4) + " there?")


def colours(direct: Direct) -> list[str]:
    """Answers to the documents of tiny_colours."""
    return [direct.answer([image(picture(n)), question(n)]) for n in range(DOCUMENTS)]


# -------------------------------------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def tasks(
    tmp_path_factory: pytest.TempPathFactory, direct: Direct
) -> Iterator[tuple[Path, list[str]]]:
    """A folder of tasks; the references of even documents are what the export answers."""
    said = colours(direct)
    assert len(set(said)) > 3, said  # the export tells documents apart
    references = [answer if n % 2 == 0 else "no" for n, answer in enumerate(said)]
    base = tmp_path_factory.mktemp("lmms")
    folder = write_tasks(base / "tasks", references)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(base / "cache"))
        yield folder, said


def evaluate(
    folder: Path, export: Path, task: str, force_simple: bool = False, **more: Any
) -> list[dict[str, Any]]:
    """The samples of an evaluation in this process, in the documents' order."""
    options = {"pretrained": export, "device": "cpu", "image_size": IMAGE_SIZE, **more}
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="casa")
    results = simple_evaluate(
        model="casa",
        model_args=",".join(f"{name}={value}" for name, value in options.items()),
        tasks=[task],
        task_manager=manager,
        batch_size="1",  # as the command always brings it
        force_simple=force_simple,
        bootstrap_iters=0,
    )
    return in_order(results["samples"][task])


def in_order(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = sorted(samples, key=lambda sample: sample["doc_id"])
    assert [sample["doc_id"] for sample in found] == list(range(DOCUMENTS))
    return found


def answers(samples: Sequence[dict[str, Any]]) -> list[Any]:
    return [sample["filtered_resps"][0] for sample in samples]


def command(folder: Path, export: Path, out: Path, *more: str) -> list[str]:
    """As a user types it, behind `python`."""
    options = f"pretrained={export},batch_size=3,device=cpu,image_size={IMAGE_SIZE}"
    words = ["-m", "lmms_eval", "--model", "casa", "--model_args", options, *more]
    words += ["--include_path", str(folder), "--output_path", str(out), "--log_samples"]
    return words


def run(words: Sequence[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    env = {**environment(), "HF_HOME": str(tmp_path / "home")}
    del env["PYTHONPATH"]  # the entry point and the package are those that are installed
    return subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def written(out: Path, task: str) -> tuple[list[str], dict[str, Any]]:
    """The answers and scores that a command wrote."""
    (file,) = out.rglob(f"*_samples_{task}.jsonl")
    (results,) = out.rglob("*_results.json")
    samples = in_order([json.loads(line) for line in file.read_text().splitlines()])
    return [s["filtered_resps"] for s in samples], json.loads(results.read_text())["results"][task]


# -------------------------------------------------------------------------------------- the command


def test_the_command_answers_as_the_export_does(
    export: Path, tasks: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, said = tasks
    done = run(command(folder, export, tmp_path / "out", "--tasks", "tiny_colours"), tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout[-3000:]
    found, scores = written(tmp_path / "out", "tiny_colours")
    assert found == said
    assert scores["said,none"] == 4 / 7
    assert "tiny_colours" in done.stdout.split("|Tasks")[-1]  # its table


def test_two_ranks_answer_as_one(
    export: Path, tasks: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Seven documents: the second rank has one less, and is given one to fill up."""
    folder, said = tasks
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = command(folder, export, tmp_path / "out", "--tasks", "tiny_colours")
    done = run([*launch, *words], tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout[-3000:]
    found, scores = written(tmp_path / "out", "tiny_colours")
    assert found == said
    assert scores["said,none"] == 4 / 7


def test_a_rank_that_fails_ends_the_others(export: Path, tmp_path: Path) -> None:
    broken = write_tasks(tmp_path / "tasks", ["no"] * DOCUMENTS)
    (broken / "1.png").write_bytes(b"no picture")  # of the second rank's first document
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = command(broken, export, tmp_path / "out", "--tasks", "tiny_messages")
    done = run([*launch, *words], tmp_path)
    assert done.returncode != 0
    assert "task tiny_messages, document 1" in done.stdout and "1.png" in done.stdout
    assert not list((tmp_path / "out").rglob("*_results.json"))


def test_a_missing_export_is_named(tasks: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = tasks
    with pytest.raises(UserError, match=f"{tmp_path / 'none'} is no export of this project"):
        evaluate(folder, tmp_path / "none", "tiny_colours")


def test_lmms_eval_finds_the_model_by_its_entry_point() -> None:
    assert lmms_eval.models.get_model("casa") is CasaChat
    assert lmms_eval.models.get_model("casa", force_simple=True) is CasaSimple


# ----------------------------------------------------------------------------------- generate_until


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_batches_answer_as_one_does(
    export: Path, tasks: tuple[Path, list[str]], batch_size: int, simple: bool
) -> None:
    folder, said = tasks
    found = evaluate(folder, export, "tiny_colours", simple, batch_size=batch_size)
    assert answers(found) == said


@pytest.mark.parametrize("batch_size", [1, 4])
def test_messages_keep_their_order(
    export: Path, direct: Direct, tasks: tuple[Path, list[str]], batch_size: int
) -> None:
    """Two images with text between, one behind text, and text alone, in one batch."""
    folder, _ = tasks
    shown: list[list[dict[str, Any]]] = []
    for n in range(DOCUMENTS):
        first, second = image(picture(n)), image(str(folder / f"{n}.png"))
        before = [[text("Look. "), first], [first, text("Look. "), second], []][n % 3]
        shown.append([*before, question(n)])
    found = answers(evaluate(folder, export, "tiny_messages", batch_size=batch_size))
    assert found == [direct.answer(content) for content in shown]
    swapped = direct.answer([shown[1][2], shown[1][1], shown[1][0], shown[1][3]])
    assert found[1] != swapped  # an order that could be told


def test_a_video_is_its_frames(export: Path, direct: Direct, tasks: tuple[Path, list[str]]) -> None:
    """Twelve frames, of which five are taken: 0, 2, 5, 8 and 11, which are that times 4 in grey."""
    folder, _ = tasks
    from lmms_eval.models.model_utils.load_video import read_video

    frames = read_video(str(folder / "film.mp4"), num_frm=5)
    assert [round(frame.mean() / 4) for frame in frames] == [0, 2, 5, 8, 11]
    found = answers(evaluate(folder, export, "tiny_films", batch_size=2, max_num_frames=5))
    film = {"type": "video", "video": frames}
    assert found == [direct.answer([film, question(n)]) for n in range(DOCUMENTS)]
    fewer = {"type": "video", "video": frames[::2]}
    assert found[0] != direct.answer([fewer, question(0)])


def test_a_system_prompt_stands_in_front(
    export: Path, direct: Direct, tasks: tuple[Path, list[str]]
) -> None:
    folder, said = tasks
    found = answers(evaluate(folder, export, "tiny_colours", system_prompt="Say one word."))
    shown = [[image(picture(n)), question(n)] for n in range(DOCUMENTS)]
    assert found == [direct.answer(content, system="Say one word.") for content in shown]
    assert found != said


def test_answers_are_kept_by_lmms_evals_cache(
    export: Path, tasks: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = tasks
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="casa")
    asked = {
        "model": "casa",
        "model_args": f"pretrained={export},device=cpu,image_size={IMAGE_SIZE}",
        "tasks": ["tiny_colours"],
        "task_manager": manager,
        "use_cache": str(tmp_path),
        "bootstrap_iters": 0,
    }
    assert answers(in_order(simple_evaluate(**asked)["samples"]["tiny_colours"])) == said
    monkeypatch.setattr(CasaChat, "generate_until", None)
    assert answers(in_order(simple_evaluate(**asked)["samples"]["tiny_colours"])) == said


# ---------------------------------------------------------------------------- requests of one's own


def model_of(export: Path, kind: type[CasaChat] = CasaChat, **more: Any) -> CasaChat:
    options = {"pretrained": str(export), "device": "cpu", "image_size": IMAGE_SIZE, **more}
    model = kind(**options)
    documents = [{"number": n} for n in range(DOCUMENTS)]
    model.task_dict = {"mine": {"test": documents}}
    return model


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(kind, given, i, {"task": "mine", "doc_id": i, "repeats": 1})
        for i, given in enumerate(arguments)
    ]


def shown(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a request for a document."""
    number = doc["number"]
    content = [{"type": "image", "url": picture(number)}, question(number)]
    return [{"role": "user", "content": content}]


def generated(export: Path, options: Sequence[dict[str, Any]], **more: Any) -> list[str]:
    """The answer to a document for each of these generation keywords."""
    asked = [("", shown, given, i, "mine", "test") for i, given in enumerate(options)]
    model = model_of(export, **more)
    results = model.generate_until(requests("generate_until", asked))
    return [result.text for result in results]


def test_an_answer_ends_before_what_a_task_says(
    export: Path, tasks: tuple[Path, list[str]]
) -> None:
    _, said = tasks
    stops = [answer[len(answer) // 2 :][:2] for answer in said]
    cut = [answer[: answer.find(stop)].strip() for answer, stop in zip(said, stops, strict=True)]
    options = [{"max_new_tokens": MAX_NEW_TOKENS, "until": [stop, "none"]} for stop in stops]
    assert generated(export, options, batch_size=4) == cut
    same = [{"max_new_tokens": MAX_NEW_TOKENS, "until": stops[0]}] * DOCUMENTS
    ends = [(answer + stops[0]).find(stops[0]) for answer in said]
    expected = [answer[:end].strip() for answer, end in zip(said, ends, strict=True)]
    assert generated(export, same, batch_size=4) == expected


def test_generation_ends_where_the_answer_does(export: Path, tasks: tuple[Path, list[str]]) -> None:
    """At a text that is whole in the answer; not at one that begins in the prompt."""
    _, said = tasks
    stop = said[0][2:4]
    assert said[0].find(stop) == 2
    options = {"max_new_tokens": MAX_NEW_TOKENS, "until": ["|>" + said[0][:1], stop]}
    asked = [("", shown, options, n, "mine", "test") for n in range(2)]
    first, second = model_of(export, batch_size=2).generate_until(requests("generate_until", asked))
    assert first.text == said[0][:2] and stop not in said[1] and second.text == said[1]
    assert first.token_counts.output_tokens < MAX_NEW_TOKENS
    assert second.token_counts.output_tokens == MAX_NEW_TOKENS
    (alone,) = model_of(export).generate_until(requests("generate_until", asked[:1]))
    assert alone.token_counts == first.token_counts and alone.text == first.text


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_papers_benchmarks_ask_for_nothing_that_is_refused(name: str) -> None:
    folder = Path(lmms_eval.__file__).parent / "tasks" / name
    path = folder / f"{name}_val.yaml"
    config = load_yaml_config(str(path if path.is_file() else folder / f"{name}.yaml"))
    given = config["generation_kwargs"]
    asked = read_keywords(given, 77).generate
    assert asked["max_new_tokens"] == given.get("max_new_tokens", 77) and not asked["do_sample"]


def test_requests_of_unlike_keywords_are_not_one_batch(export: Path, direct: Direct) -> None:
    options = [{"max_new_tokens": 3 + n % 3} for n in range(DOCUMENTS)]
    expected = [
        direct.answer([image(picture(n)), question(n)], tokens=3 + n % 3) for n in range(DOCUMENTS)
    ]
    assert generated(export, options, batch_size=4) == expected


def test_without_a_length_the_models_own_holds(export: Path, direct: Direct) -> None:
    expected = direct.answer([image(picture(0)), question(0)], tokens=5)
    assert generated(export, [{"until": None}], max_new_tokens=5) == [expected]


def test_tokens_are_counted_up_to_an_answers_end(export: Path, direct: Direct) -> None:
    """Of a batch in which one answer ends early: its tokens, not the padding behind."""
    model = model_of(export, batch_size=2)
    messages = [{"role": "user", "content": [image(picture(0)), question(0)]}]
    batch = direct.processor.tokenize_messages(messages)
    out = direct.model.generate_from_image(**batch, max_new_tokens=3, do_sample=False)
    assert model.asked is not None
    # The third token of the first answer.
    model.asked.model.generation_config.eos_token_id = int(out[0, -1])
    asked = [("", shown, {"max_new_tokens": 6}, n, "mine", "test") for n in range(2)]
    counts = [
        result.token_counts.output_tokens
        for result in model.generate_until(requests("generate_until", asked))
    ]
    assert counts[0] == 3 and counts[1] > 3


# -------------------------------------------------------------------------------------- multi-round


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
def test_rounds_go_on_until_the_task_ends_them(
    export: Path, direct: Direct, tasks: tuple[Path, list[str]], batch_size: int, simple: bool
) -> None:
    """One to three rounds a document; in the second the picture is gone, in the third back."""
    folder, _ = tasks
    expected = []
    for n in range(DOCUMENTS):
        said = [direct.answer([image(picture(n)), question(n)])]
        for number in range(1, 1 + n % 3):
            seen = [image(picture(n))] if number == 2 else []
            said.append(direct.answer([*seen, text(f"{said[-1]} and then?")]))
        expected.append(said)
    found = answers(evaluate(folder, export, "tiny_rounds", simple, batch_size=batch_size))
    assert found == expected
    assert [len(said) for said in found] == [1, 2, 3, 1, 2, 3, 1]


def test_a_task_of_one_round_may_be_asked_so(export: Path, tasks: tuple[Path, list[str]]) -> None:
    """Its messages know nothing of rounds, and come again."""
    _, said = tasks

    def again(doc: dict[str, Any], **rounds: Any) -> Any:
        return shown(doc)

    asked = [
        ("", again, {"max_new_tokens": MAX_NEW_TOKENS}, n, "mine", "test") for n in range(DOCUMENTS)
    ]
    kind = "generate_until_multi_round"
    found = model_of(export, batch_size=3).generate_until_multi_round(requests(kind, asked))
    assert found == [[answer] for answer in said]


# ---------------------------------------------------------------------------------- log-likelihoods


@pytest.mark.parametrize("batch_size", [1, 5])
def test_choices_are_scored_as_the_export_finds_them(
    export: Path, direct: Direct, tasks: tuple[Path, list[str]], batch_size: int
) -> None:
    """The likeliest wins, whatever sign this release of lmms-eval wants."""
    folder, _ = tasks
    found = evaluate(folder, export, "tiny_choices", True, batch_size=batch_size)
    likeliest = []
    for n, sample in enumerate(found):
        content = [image(picture(n)), question(n)]
        expected = [direct.log_likelihood(content, choice)[0] for choice in CHOICES]
        given = [abs(float(value)) for value, _ in sample["filtered_resps"]]
        assert given == pytest.approx([-value for value in expected], rel=1e-5)
        likeliest.append(int(np.argmax(expected)))
    assert len(set(likeliest)) > 1 or likeliest[0] != 0
    right = [float(best == n % len(CHOICES)) for n, best in enumerate(likeliest)]
    assert [sample["acc"] for sample in found] == right
    assert 0 < sum(right) < DOCUMENTS


def test_a_continuation_is_scored_by_its_log_probability(
    export: Path, direct: Direct, tasks: tuple[Path, list[str]]
) -> None:
    """The greedy one is greedy, others are not; with an image, without any, and an empty one."""
    content = [image(picture(2)), text("What is there?")]
    greedy = direct.answer(content, tokens=2)
    pictured = [" two red squares", " " + greedy, greedy, ""]
    asked: list[tuple[Any, ...]] = [
        (
            "What is there?",
            (lambda doc, said=said: said),
            lambda doc: [picture(2)],
            2,
            "mine",
            "test",
        )
        for said in pictured
    ]
    asked += [("What is there?", " blue")]
    found = model_of(export, batch_size=3).loglikelihood(requests("loglikelihood", asked))
    expected = [direct.log_likelihood(content, said.strip()) for said in pictured[:3]]
    expected += [(0.0, True), direct.log_likelihood([text("What is there?")], "blue")]
    for (value, same), (other, greedily) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-5)
        assert same == greedily
    assert [same for _, same in found] == [False, True, True, True, False]
    assert all(value < 0 for value, _ in (*found[:3], found[4]))


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frobnicate": 3}, "frobnicate=3 is unknown to the model casa; expected pretrained,"),
        ({"pretrained": ""}, "pretrained is missing"),
        ({"batch_size": "auto"}, "batch_size=auto; expected a whole number"),
        ({"batch_size": 0}, "batch_size=0; expected a whole number"),
        ({"image_size": 89.5}, "image_size=89.5; expected a whole number"),
        ({"image_size": 2}, "image_size"),
        ({"dtype": "int8"}, "dtype=int8; expected one of auto,"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"max_batch_size": 8}, "--max_batch_size 8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_are_refused_by_name(export: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        model_of(export, **options)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 3}, "mine, document 1: generation_kwargs.num_beams=3"),
        ({"n": 2}, "generation_kwargs.n=2"),
        ({"visual_cot": True}, "generation_kwargs: visual_cot=True is unknown"),
        ({"penalty_alpha": 0.6}, "penalty_alpha is not supported"),
    ],
    ids=["beams", "several", "unknown", "refused by the export"],
)
def test_keywords_are_refused_by_name(export: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        generated(export, [{"max_new_tokens": 2}, {"max_new_tokens": 2, **options}])
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "audio", "url": "talk.wav"}, "audio ('talk.wav')"),
        ({"type": "image", "url": None}, "an image is None"),
        ({"type": "image", "url": "nowhere.png"}, "nowhere.png"),
        ({"type": "video", "url": "nowhere.mp4"}, "video nowhere.mp4"),
        ({"type": "video", "url": "a.mp4", "start_time": 2.0}, "a part of a video"),
        ({"type": "video", "url": {"url": "a.mp4", "video_end": 3}}, "a part of a video"),
        ({"type": "hologram", "url": "a.holo"}, "hologram"),
    ],
    ids=["audio", "none", "missing", "no film", "from", "to", "unknown"],
)
def test_what_cannot_be_shown_is_refused_by_name(
    export: Path, part: dict[str, Any], says: str
) -> None:
    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [part, text("What is there?")]}]

    asked = [("", messages, {"max_new_tokens": 2}, 4, "mine", "test")]
    with pytest.raises(UserError) as refused:
        model_of(export).generate_until(requests("generate_until", asked))
    assert str(refused.value).startswith("task mine, document 4: ") and says in str(refused.value)


def test_a_simple_request_shows_what_it_is_given(
    export: Path, direct: Direct, tmp_path: Path
) -> None:
    """Pictures, files of pictures, dicts of either, frames; audio is refused."""
    picture(1).save(tmp_path / "one.PNG")
    frames = [picture(0), picture(0).rotate(90)]
    visuals: list[Any] = [picture(0), str(tmp_path / "one.PNG")]
    visuals += [{"type": "image", "path": str(tmp_path / "one.PNG")}, {"url": frames}]
    model = model_of(export, CasaSimple)
    options = {"max_new_tokens": MAX_NEW_TOKENS}
    asked = [("What?", options, lambda doc: visuals, 0, "mine", "test")]
    (found,) = model.generate_until(requests("generate_until", asked))
    one = image(Image.open(tmp_path / "one.PNG"))
    film = {"type": "video", "video": frames}
    assert found.text == direct.answer([image(picture(0)), one, one, film, text("What?")])
    asked = [("What?", options, lambda doc: ["talk.mp3"], 0, "mine", "test")]
    with pytest.raises(UserError, match="audio"):
        model.generate_until(requests("generate_until", asked))
