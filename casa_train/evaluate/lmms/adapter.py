"""The model `casa` of lmms-eval: an export, asked as its users ask it."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from tqdm import tqdm

from casa_train.errors import UserError
from casa_train.evaluate.lmms.asking import Asked, Conversation
from casa_train.evaluate.lmms.keywords import OF_OTHERS, Keywords, read_keywords
from casa_train.evaluate.lmms.model_options import read_options
from casa_train.evaluate.lmms.requested import (
    Request,
    Scored,
    chat_request,
    conversation,
    scored_request,
    simple_request,
)

T = TypeVar("T")

LOWEST_WINS = "np.argmin(lls)" in inspect.getsource(ConfigurableTask.process_results)
"""Whether tasks with choices take the one of the lowest value. Release 0.7.3 does, since its models
return a loss where its interface has a log-probability.
"""


class LogLikelihood(tuple, GenerationResult):
    """(log-probability, greedy), as lmms-eval's interface has it.

    The evaluator of 0.7.3 makes text of every result that is not a `GenerationResult`, a pair of
    numbers too, and no task can read that.

    :param text: the same pair, for the evaluator to hand on.
    """


class CasaChat(lmms):
    """Asked with the messages of a task.

    Every rank of a launch has the whole model on its own device and answers its share of the
    documents; lmms-eval hands them out and puts the answers together.

    :param arguments: `ModelOptions`, and `max_batch_size`, which is None.
    :raises UserError: an argument that is unknown or wrong, or no export.
    """

    is_simple = False

    def __init__(self, max_batch_size: Any = None, **arguments: Any) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise UserError(
                f"--max_batch_size {max_batch_size}: no batch size is searched for here; expected "
                "--batch_size alone"
            )
        self.options = read_options(arguments)
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        self._seconds, self._tokens = 0.0, 0  # of what is being generated
        self.device = self.options.place()
        prompt = self.options.system_prompt
        self.system_prompt = self._resolve_system_prompt(prompt) if prompt else None
        self.asked: Asked | None = Asked(
            self.options.pretrained,
            self.device,
            self.options.torch_dtype,
            self.options.image_size,
        )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> CasaChat:
        """As lmms-eval's, but that `--model_args` may name what has an option of its own, too: the
        command always brings a `--batch_size`.
        """
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    @property
    def batch_size(self) -> int:
        return self.options.batch_size

    def clean(self) -> None:
        """As lmms-eval's: frees the model once everything is answered."""
        self.asked = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """An answer to each request, in their order."""
        return self._in_batches("generate_until", requests, self._answer)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers to each request, one a round, in their order.

        A round is asked alone: what is to be seen of earlier ones, the task puts into it.
        """
        return self._in_batches("generate_until_multi_round", requests, self._converse)

    def loglikelihood(self, requests: Sequence[Any]) -> list[LogLikelihood]:
        """For each continuation the sum of its tokens' log-probabilities, and whether greedy
        decoding would give it; see `Asked.log_likelihoods`. The sums of choices are negated where
        lmms-eval takes the lowest.
        """
        with self._together():
            scored = [scored_request(r.args, self.task_dict) for r in requests]
            # The choices of a document beside each other, long ones first.
            order = sorted(range(len(scored)), key=lambda i: -len(scored[i].context))
            found: dict[int, LogLikelihood] = {}
            for rows in self._batches("loglikelihood", [order]):
                batch = [scored[i] for i in rows]
                for i, (value, greedy) in zip(rows, self._score(batch), strict=True):
                    negated = scored[i].choice and LOWEST_WINS
                    found[i] = LogLikelihood((-value if negated else value, greedy))
                    given = (scored[i].context, scored[i].continuation())
                    self.cache_hook.add_partial("loglikelihood", given, found[i])
            return [found[i] for i in range(len(scored))]

    def _request(self, arguments: Sequence[Any]) -> Request:
        return chat_request(arguments, self.task_dict)

    def _in_batches(
        self,
        method: str,
        requests: Sequence[Any],
        work: Callable[[Sequence[Request], Keywords], Sequence[T]],
    ) -> list[T]:
        """The results of batches of requests with the same keywords, in the requests' order."""
        with self._together():
            asked = [self._request(r.args) for r in requests]
            alike: dict[str, list[int]] = defaultdict(list)
            for i in sorted(range(len(asked)), key=lambda i: -len(asked[i].context)):
                alike[json.dumps(dict(asked[i].options), sort_keys=True, default=str)].append(i)
            groups = list(alike.values())
            settled: dict[int, Keywords] = {}
            for group in groups:  # all of them, before the first answer
                settled |= dict.fromkeys(group, self._keywords(asked[group[0]]))
            results: dict[int, T] = {}
            for rows in self._batches(method, groups):
                done = work([asked[i] for i in rows], settled[rows[0]])
                for i, result in zip(rows, done, strict=True):
                    results[i] = result
                    text = result.text if isinstance(result, GenerationResult) else result
                    given = (asked[i].context, dict(asked[i].options))
                    self.cache_hook.add_partial(method, given, text)
            log_metrics(self._seconds, self._tokens, self._tokens / max(self._seconds, 1e-9))
            self._seconds, self._tokens = 0.0, 0
            return [results[i] for i in range(len(asked))]

    def _batches(self, name: str, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Each group in batches, with a progress bar on the first rank."""
        total = sum(map(len, groups))
        with tqdm(total=total, desc=f"casa: {name}", disable=self.rank != 0) as bar:
            for group in groups:
                for start in range(0, len(group), self.batch_size):
                    rows = group[start : start + self.batch_size]
                    yield rows
                    bar.update(len(rows))

    def _keywords(self, request: Request) -> Keywords:
        unused = [name for name in OF_OTHERS if request.options.get(name) is not None]
        if unused and self.rank == 0:
            logger.warning(
                f"{request.name}: {', '.join(unused)} of generation_kwargs has no effect"
            )
        with _naming([request]):
            return read_keywords(request.options, self.options.max_new_tokens)

    def _answer(self, batch: Sequence[Request], keywords: Keywords) -> list[GenerationResult]:
        with _naming(batch):
            return self._generate([r.opening() for r in batch], keywords)

    def _converse(self, batch: Sequence[Request], keywords: Keywords) -> list[list[str]]:
        outputs: list[list[Any]] = [[] for _ in batch]
        infos: list[Any] = [None] * len(batch)
        number = 0
        with _naming(batch):
            asking = {i: request.opening() for i, request in enumerate(batch)}
            while asking:
                answers = self._generate(list(asking.values()), keywords)
                for i, answer in zip(asking, answers, strict=True):
                    outputs[i] = [*outputs[i], answer.text]
                number += 1
                following = {}
                for i in asking:
                    messages, outputs[i], infos[i] = batch[i].following(
                        number, outputs[i], infos[i]
                    )
                    if messages is not None:
                        following[i] = messages
                asking = following
        return outputs

    def _generate(self, messages: Sequence[Any], keywords: Keywords) -> list[GenerationResult]:
        conversations = [self._conversation(given) for given in messages]
        start = time.perf_counter()
        answers = self._model.answer(conversations, keywords)
        seconds, tokens = time.perf_counter() - start, sum(count for _, count in answers)
        log_metrics(total_elapsed_time=seconds, total_gen_tokens=tokens, avg_speed=tokens / seconds)
        return [GenerationResult(text, TokenCounts(output_tokens=n)) for text, n in answers]

    def _score(self, batch: Sequence[Scored]) -> list[tuple[float, bool]]:
        with _naming(batch):
            conversations = [self._conversation(request.opening()) for request in batch]
            return self._model.log_likelihoods(conversations, [r.continuation() for r in batch])

    def _conversation(self, messages: Any) -> Conversation:
        found = conversation(messages, self.options.max_num_frames)
        return self._apply_system_prompt(found, self.system_prompt)  # type: ignore[no-any-return]

    @property
    def _model(self) -> Asked:
        assert self.asked is not None, "asked after clean()"
        return self.asked

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Ends this process when a rank of several fails: lmms-eval would only log the error, and
        leave the other ranks waiting for this one. Their launcher ends them.
        """
        try:
            yield
        except Exception as error:
            if self.world_size == 1:
                raise
            logger.opt(exception=error).error(f"rank {self.rank}: {error}")
            raise SystemExit(2) from error


class CasaSimple(CasaChat):
    """Asked with a text and what to show before it: what `--force_simple` takes."""

    is_simple = True

    def _request(self, arguments: Sequence[Any]) -> Request:
        return simple_request(arguments, self.task_dict)


@contextmanager
def _naming(batch: Sequence[Request | Scored]) -> Iterator[None]:
    """Puts the documents of a batch in front of what is wrong with one of them."""
    try:
        yield
    except (UserError, ValueError, OSError) as error:
        names = "; ".join(dict.fromkeys(request.name for request in batch))
        raise UserError(f"{names}: {error}") from error
