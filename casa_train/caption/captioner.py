"""A model that says what it sees, frame after frame: streams over one cache, the model's side.

A stream is one long answer. Its ids are those of training (`data.schemas.video_rows`): the request,
then every frame with what the template puts around images, and behind it the frame's words and the
frame's end. Only text enters the cache of a cross-attention model; an insertion model runs the same
way and keeps all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from casa_train.caption.frame_text import FrameText
from casa_train.caption.options import TURN_END, CaptionOptions
from casa_train.caption.token_choice import TokenChoice
from casa_train.errors import UserError
from casa_train.export.loading import load_model, load_processor
from casa_train.metrics.meter import memory_bytes, reset_peak

Heard = Callable[[int, str], None]


@dataclass(frozen=True)
class FrameCaption:
    """What was said to one frame.

    :param text: without the frame's end; empty: nothing.
    :param tokens: new ones, with the end.
    :param first_token: seconds from the frame until its first token was there; in a batch all
        frames count from the same moment.
    :param tokens_per_second: of the tokens after the first; None: there was none.
    :param cache_tokens: of this stream in the KV cache.
    :param memory_bytes: the most that the GPU held for tensors meanwhile, or all that the process
        holds where there is none.
    :param cut: whether the time or `max_new_tokens` ended the answer.
    """

    text: str
    tokens: int
    first_token: float
    tokens_per_second: float | None
    cache_tokens: int
    memory_bytes: int
    cut: bool = False


class Captioner:
    """A model and how it is asked; makes streams.

    :param model: of an export, in eval mode.
    :ivar frame_end: ids that end a frame in which nothing is said.
    :ivar turn_ends: tokens that end an answer.
    :ivar lock: held while a frame is captioned, so that streams of several threads take turns.
    :raises UserError: a model without a chat template for streams.
    """

    def __init__(self, model: Any, processor: Any, options: CaptionOptions) -> None:
        options.check()
        self.model, self.processor, self.options = model, processor, options
        self.lock = threading.Lock()
        self.device: torch.device = model.lm_head.weight.device
        self.frame_end = _frame_end(processor, options.frame_end)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        self.turn_ends: set[int] = {*ends, processor.answer_end_token} - {None}

    @classmethod
    def load(
        cls,
        export: Path,
        options: CaptionOptions,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        image_size: int | None = None,
        processor: Any = None,
    ) -> Captioner:
        """Loads an export as its users do.

        :param device: None: the GPU if there is one.
        :param image_size: frames of at most so many pixels squared; None: as the export says.
        :param processor: of the export, where `stream_processor` has read it already.
        :raises UserError: a directory that is no export, or one without a template for streams.
        """
        options.check()
        processor = processor or stream_processor(export, options, image_size)
        model = load_model(export, dtype)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        return cls(model, processor, options)

    def asking(self, **values: Any) -> Captioner:
        """The same model, asked in another way; it takes turns with this one.

        :param values: of `CaptionOptions`.
        :raises UserError: a value that cannot be.
        """
        other = Captioner(self.model, self.processor, self.options.changed(**values))
        other.lock = self.lock
        return other

    def open(self, streams: int = 1, prompts: Sequence[str] | None = None) -> CaptionStreams:
        """New streams, side by side in one batch.

        :param prompts: of each stream, in place of the one of all.
        """
        asked = [self.options.prompt] * streams if prompts is None else list(prompts)
        return CaptionStreams(self, asked)


@dataclass
class _Stream:
    """One row of the batch.

    :param end: the ids that end its frames: where a model has several, those that it said last.
    :param entering: ids that were said, or stand in place of what was, and have not entered yet.
    """

    prompt: str
    choice: TokenChoice
    end: list[int]
    began: bool = False
    entering: list[int] = field(default_factory=list)


class CaptionStreams:
    """A batch of streams on one model, each equal to itself alone."""

    def __init__(self, captioner: Captioner, prompts: Sequence[str]) -> None:
        self.captioner = captioner
        self.cache = DynamicCache()
        options, end = captioner.options, captioner.frame_end
        exempt = {*end, *captioner.turn_ends}
        stop = {end[0], *captioner.turn_ends}
        self._rows = [
            _Stream(prompt, TokenChoice(options, exempt, stop), end) for prompt in prompts
        ]

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def caption(
        self, frames: Sequence[Any], heard: Heard | None = None, deadline: float | None = None
    ) -> list[FrameCaption]:
        """Shows every stream its next frame and says what belongs to it.

        :param frames: one a stream, whatever the processor takes for an image.
        :param heard: is given the row and each new piece of its text as tokens arrive.
        :param deadline: of `time.monotonic()`; what is not said by then is cut, after one token at
            least.
        :raises ValueError: another number of frames than of streams.
        """
        if len(frames) != len(self):
            raise ValueError(f"{len(frames)} frames for {len(self)} streams")
        with self.captioner.lock:
            return self._caption(frames, heard, deadline)

    def _caption(
        self, frames: Sequence[Any], heard: Heard | None, deadline: float | None
    ) -> list[FrameCaption]:
        options, rows = self.captioner.options, self._rows
        began = time.perf_counter()
        if self.captioner.device.type == "cuda":
            reset_peak(self.captioner.device)
        texts = [
            FrameText(
                self.captioner.processor,
                "" if options.frame_end == TURN_END else options.frame_end,
                "" if stream.began else options.begin,
                None if heard is None else _to(heard, row),
            )
            for row, stream in enumerate(rows)
        ]
        logits = self._show(frames)
        open_, cut = [True] * len(rows), [False] * len(rows)
        first, last = 0.0, [0.0] * len(rows)
        for count in range(options.max_new_tokens):
            tokens = self._choose(logits, open_)
            now = time.perf_counter()
            first = first or now
            for row, token in enumerate(tokens):
                if open_[row]:
                    last[row] = now
                    open_[row] = not self._ends(row, token, texts[row])
            late = deadline is not None and time.monotonic() >= deadline
            if not any(open_) or late or count + 1 == options.max_new_tokens:
                break
            logits = self._step(tokens, open_)
        for row in [row for row, goes_on in enumerate(open_) if goes_on]:
            # The words stay, and so does the end that training has behind every frame's words.
            cut[row] = True
            rows[row].entering = [texts[row].ids[-1], *rows[row].end]
        memory = _memory(self.captioner.device)
        return [
            FrameCaption(
                text=texts[row].finish(),
                tokens=len(texts[row].ids),
                first_token=first - began,
                tokens_per_second=_rate(len(texts[row].ids) - 1, last[row] - first),
                cache_tokens=self._cache_tokens(row),
                memory_bytes=memory,
                cut=cut[row],
            )
            for row in range(len(rows))
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these streams alone; the others are over and leave the cache."""
        if list(rows) == list(range(len(self))):
            return
        with self.captioner.lock:
            self._rows = [self._rows[row] for row in rows]
            if not rows:
                self.cache = DynamicCache()
            elif hasattr(self.cache, "casa"):
                self.cache.batch_select_indices(torch.tensor(rows, device=self.captioner.device))

    def close(self) -> None:
        """Ends all streams and frees what they hold."""
        self.keep([])

    def _show(self, frames: Sequence[Any]) -> Tensor:
        """Enters what waits and the next frames; returns the (B, vocabulary) logits behind them."""
        processor = self.captioner.processor
        entered = [self._frame_ids(stream) for stream in self._rows]
        width = max(len(ids) for ids, _, _ in entered)
        pad = processor.tokenizer.pad_token_id or 0
        ids = [[pad] * (width - len(row)) + row for row, _, _ in entered]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row, _, _ in entered]
        points = [[width - len(row) + point] for row, point, _ in entered]
        follows = [[after] for _, _, after in entered]
        device = self.captioner.device
        output = self.captioner.model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            pixel_values=[processor.image_processor.load(frame).to(device) for frame in frames],
            image_embeds_insertion_points=points,
            image_follows=follows if any(after for _, _, after in entered) else None,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for stream in self._rows:
            stream.began, stream.entering = True, []
        logits: Tensor = output.logits[:, -1]
        return logits

    def _frame_ids(self, stream: _Stream) -> tuple[list[int], int, bool]:
        """Ids of a stream's next frame, where among them it stands, and whether it follows one."""
        processor = self.captioner.processor
        if stream.began:
            before = [*stream.entering, *processor.pre_image_tokens]
            ids = [*before, *processor.post_image_tokens]
            # Without anything around images there has to be a token to predict from: the end of the
            # frame before stands in front of the image and is the last one.
            return ids, len(before), True
        encoded = processor.encode(
            opening(self.captioner.options, stream.prompt), continue_final=True
        )
        return encoded.ids, encoded.points[0], False

    def _choose(self, logits: Tensor, open_: Sequence[bool]) -> list[int]:
        """The next token of every stream; of those that ended any."""
        if self.captioner.options.greedy:
            tokens: list[int] = logits.argmax(-1).tolist()
        else:
            host = logits.float().cpu()
            tokens = [
                stream.choice.choose(row) if goes_on else 0
                for stream, row, goes_on in zip(self._rows, host, open_, strict=True)
            ]
        for stream, token, goes_on in zip(self._rows, tokens, open_, strict=True):
            if goes_on:
                stream.choice.said(token)
        return tokens

    def _ends(self, row: int, token: int, text: FrameText) -> bool:
        """Whether a token ends the row's frame; then it waits to enter with the next one."""
        if token in self.captioner.turn_ends:
            text.ids.append(token)
            # A turn that ends early goes on with the next frame, as if only the frame had ended;
            # where that is how frames end, the very token enters.
            if self.captioner.options.frame_end == TURN_END:
                self._rows[row].end = [token]
            self._rows[row].entering = self._rows[row].end
            return True
        if not text.add(token):
            return False
        self._rows[row].entering = [token]
        return True

    def _step(self, tokens: Sequence[int], open_: Sequence[bool]) -> Tensor:
        """Enters a token of each stream that goes on; returns (B, vocabulary) logits."""
        output = self.captioner.model(
            input_ids=torch.tensor(tokens, device=self.captioner.device)[:, None],
            finished=None if all(open_) else [not goes_on for goes_on in open_],
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _cache_tokens(self, row: int) -> int:
        if not self.cache.get_seq_length():  # no layer keeps any
            return 0
        return sum(stop - start for start, stop in self.cache.casa.slots[row])


def stream_processor(export: Path, options: CaptionOptions, image_size: int | None = None) -> Any:
    """The processor of an export, which is read before gigabytes of weights are.

    :param image_size: see `Captioner.load`.
    :raises UserError: a directory that is no export, or one without a template for streams.
    """
    sizes = {} if image_size is None else {"image_size": image_size}
    processor = load_processor(export, **sizes)
    try:
        _frame_end(processor, options.frame_end)
    except UserError as error:
        raise UserError(f"{export}: {error}") from error
    return processor


def opening(options: CaptionOptions, prompt: str) -> list[dict[str, Any]]:
    """The messages before and with the first frame, whose pixels are given apart."""
    content: list[dict[str, Any]] = [{"type": "video", "video": [None]}]
    if options.begin:
        content.append({"type": "text", "text": options.begin})
    messages = []
    for role, words in (("system", options.system), ("user", prompt)):
        if words:
            messages.append({"role": role, "content": [{"type": "text", "text": words}]})
    return [*messages, {"role": "assistant", "content": content}]


def _frame_end(processor: Any, frame_end: str) -> list[int]:
    """The ids that end a frame in which nothing is said.

    :raises UserError: a template that cannot hold an answer that goes on over frames.
    """
    template = processor.template
    if not (template["assistant_start"] or template["user_end"]):
        raise UserError(
            "the processor has no chat template for streams: neither assistant_start nor user_end "
            "is set, so nothing tells a request from the captions that answer it. Train or export "
            "with a chat template (model.template)."
        )
    if frame_end == TURN_END:
        if processor.answer_end_token is None:
            raise UserError(
                f"frame_end is {TURN_END!r}, but the processor's chat template has no token that "
                "ends an answer; name the text that ends a frame."
            )
        return [processor.answer_end_token]
    content = [{"type": "video", "video": [None]}, {"type": "text", "text": frame_end}]
    encoded = processor.encode([{"role": "assistant", "content": content}], continue_final=True)
    behind = encoded.points[0] + len(processor.post_image_tokens)
    ids: list[int] = encoded.ids[behind:]
    if not ids:
        raise UserError(f"frame_end {frame_end!r} has no tokens; name the text that ends a frame.")
    return ids


def _to(heard: Heard, row: int) -> Callable[[str], None]:
    return lambda piece: heard(row, piece)


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def _memory(device: torch.device) -> int:
    """Bytes: the peak of the GPU's tensors, or what the process holds now."""
    now, peak = memory_bytes(device)
    return int(peak if device.type == "cuda" else now)
