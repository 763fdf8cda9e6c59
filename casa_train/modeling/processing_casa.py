"""CasaProcessor: messages or rendered text -> token ids, insertion points, answer mask and images.

Images never become tokens: an image leaves an *insertion point*, the index of the text token it
stands before. Training, recipes and inference call the same `encode`, so they share template,
tokenizer and pixels. The rest is the interface that transformers' users expect of a processor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import ProcessorMixin

from .batching import CasaBatch, batch_of, distribute, image_lists, video_lists
from .chat_template import SLOTS, ChatTemplate, is_jinja_of
from .encoding import ConversationEncoder, Draft, Encoded
from .image_processing_casa import MAX_PIXELS, SIDE, CasaImageProcessor, square, target_size
from .image_sources import ImageError
from .loading_options import split_options
from .messages import Message, as_batch, frames_of, in_order, slots_of, unshared
from .text_ids import TextIds


class CasaProcessor(ConversationEncoder, ProcessorMixin):
    """Tokenizer, chat template and image code of one model.

    Tokens may be added to `tokenizer` at any time; ids are the same before and after saving. In a
    message a plain added token is read wherever it is written; one added as special stays text
    there, as every special token does, and acts where text is given as rendered, in `__call__`.

    :param tokenizer: a fast tokenizer.
    :param max_pixels: upper bound on the pixels of an image.
    :param template: `ChatTemplate` as a dict.
    :param image_size: when given, at most image_size * image_size pixels, whatever `max_pixels` is.
    :param chat_template: jinja to render with instead of the template's own.
    :param min_pixels: smaller images are enlarged to so many pixels at least; 0: none.
    :param token_side: pixels of an image token's side, the model's vision tower's. Directories that
        do not tell are of Qwen2.5-VL's.
    :raises ValueError: no fast tokenizer, a template with fields of another type, or bounds that no
        image can meet.
    """

    chat_template: str | None
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        max_pixels: int = MAX_PIXELS,
        template: dict[str, Any] | None = None,
        image_size: int | None = None,
        chat_template: str | None = None,
        min_pixels: int = 0,
        token_side: int = SIDE,
        **kwargs: Any,
    ) -> None:
        if image_size is not None:
            max_pixels = square(image_size, "image_size", token_side)
        self._image_processor = CasaImageProcessor(max_pixels, min_pixels, token_side)
        self._template = ChatTemplate(**(template or {}))
        self.template = asdict(self._template)
        self._take_in(tokenizer)
        if chat_template is None or is_jinja_of(self._template, chat_template):
            chat_template = self._jinja  # of the tokenizer's tokens as they are now
        super().__init__(tokenizer, chat_template=chat_template, **kwargs)
        # A text-only prompt of the tokenizer's own reads as the processor's.
        tokenizer.chat_template = self.chat_template
        self._start = self._end = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As the library's, but that every keyword acts, in every version of it, or is refused.

        :param kwargs: this class's own, among them `image_size`, `max_pixels` and `min_pixels` in
            place of what the directory says; a tokenizer's; and where files are.
        :raises ValueError: a keyword that would have no effect.
        """
        own, passed = split_options(kwargs)
        with_unused = passed.pop("return_unused_kwargs", False)  # transformers 5 fails over it
        processor = super().from_pretrained(pretrained_model_name_or_path, **passed)
        if own:
            processor = processor._changed(**own)
        return (processor, {}) if with_unused else processor

    def _changed(self, **own: Any) -> CasaProcessor:
        """The same with other arguments."""
        self._keep_up()
        size = own.pop("image_size", None)
        if size is not None:
            own["max_pixels"] = square(size, "image_size", self.token_side)
        if "max_pixels" in own and "min_pixels" not in own:
            own["min_pixels"] = self._image_processor.at_most(own["max_pixels"]).min_pixels
        same = {"tokenizer": self.tokenizer, "template": self.template}
        same |= {"max_pixels": self.max_pixels, "min_pixels": self.min_pixels}
        same["token_side"] = self.token_side
        if self.chat_template != self._jinja:  # else it follows from the template
            same["chat_template"] = self.chat_template
        return type(self)(**{**same, **own})

    @property
    def max_pixels(self) -> int:
        """Upper bound on the pixels of an image; may be set, here or on the image processor."""
        return self._image_processor.max_pixels

    @max_pixels.setter
    def max_pixels(self, pixels: int) -> None:
        self._image_processor.max_pixels = pixels

    @property
    def min_pixels(self) -> int:
        """Lower bound; see `max_pixels`."""
        return self._image_processor.min_pixels

    @min_pixels.setter
    def min_pixels(self, pixels: int) -> None:
        self._image_processor.min_pixels = pixels

    @property
    def token_side(self) -> int:
        """Pixels of an image token's side."""
        return self._image_processor.side

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the library's: what `save_pretrained` writes, with the bounds in force."""
        bounds = {"max_pixels": self.max_pixels, "min_pixels": self.min_pixels}
        bounds["token_side"] = self.token_side
        return {**super().to_dict(*args, **kwargs), **bounds}

    @property
    def image_processor(self) -> CasaImageProcessor:
        return self._image_processor

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_embeds_insertion_points"]

    def tokenize_messages(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        suppress_bos_token: bool = False,
        end_answer: bool = False,
    ) -> CasaBatch:
        """A batch ready for `generate_from_image`.

        :param messages: one conversation, or a list of them.
        :param suppress_bos_token: the messages go on with a stream, whose last answer ended with an
            end token; see `encode`'s `continues` and `end_answer`.
        :return: `input_ids` and `attention_mask` (B, T); `image_embeds_insertion_points`, for each
            sample an int64 tensor of the columns of `input_ids` at which its images stand;
            `pixel_values`, a list of (3, H, W) uint8 tensors over all samples. Slots with image
            None have no pixels.
        """
        conversations, _ = as_batch(messages)
        return self._batch(
            [
                self.encode(
                    c,
                    generation_prompt=c[-1].get("role") != "assistant" if c else False,
                    continues=suppress_bos_token,
                    end_answer=end_answer,
                )
                for c in conversations
            ]
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **options: Any,
    ) -> CasaBatch:
        """A batch from text as the chat template renders it. The text may stand first as well.

        :param images: for the places `<image>` in the text: one image, a list over all texts, or a
            list for each text, which may be None where a text has no place.
        :param text: one text or a list. `<image>` and `<video>` are places, never tokens; written
            `<\\image>` they are words.
        :param videos: for the places `<video>`: one list of frames, or a list of such lists.
        :param options: `return_tensors` ("pt" or None), `padding`, `padding_side`, `max_length`.
        :raises ValueError: another number of places than of images or videos; unknown options.
        """
        self._keep_up()
        images, text = in_order(images, text, self._holds_place)
        texts = [text] if isinstance(text, str) else list(text)
        pieces = [list(self._rendered.read(t)) for t in texts]
        counts = {slot: [sum(kind == slot for kind, _ in p) for p in pieces] for slot in SLOTS}
        given = {
            "image": distribute("image", image_lists(images), counts["image"]),
            "video": distribute("video", video_lists(videos), counts["video"]),
        }
        encoded = []
        for row in pieces:
            draft = Draft()
            shown: int | None = None  # images of the answer that is open
            for kind, piece in row:
                if kind == "text":
                    draft.add([piece])
                elif kind == "special":
                    draft.add([self._text_ids.special[piece]])
                elif kind in ("answer", "turn"):
                    shown = 0 if kind == "answer" else None
                    if kind == "answer":
                        draft.cut()
                else:
                    image = next(given[kind])
                    frames = frames_of(image) if kind == "video" else [image]
                    # A bare place has nothing around it but what the text has there.
                    around = kind == "video" or bool(piece)
                    self._place(draft, frames, follows=bool(shown), around=around)
                    shown = None if shown is None else shown + len(frames)
            encoded.append(draft.encode(self._text_ids, start=True))
        return self._batch(encoded, **{"return_tensors": None, **options})

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the library's: conversations as text, as ids or, with `return_dict`, as a batch.

        With `tokenize`, messages go through `encode`, as in training, so no text of a user is
        taken for an image. A template of the caller's own is rendered and read back.

        :param processor_kwargs: options of `__call__`; given directly, they are taken as well.
        """
        rendered = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if isinstance(conversation, str):
            as_batch(conversation)  # says what is expected
        self._keep_up()
        own = (chat_template or self.chat_template) == self._jinja
        if not tokenize:
            open_end = own and continue_final_message
            if open_end:
                # The library looks for the last message's words, which may stand quoted here.
                rendered["continue_final_message"] = False
            # Some releases, 5.5 and 5.17 among them, rewrite the messages that they get.
            text = super().apply_chat_template(
                unshared(conversation),
                chat_template=chat_template,
                tokenize=False,
                **rendered,
                **kwargs,
            )
            if not open_end:
                return text
            end = self._template.assistant_end
            if isinstance(text, str):
                return text.removesuffix(end)
            return [one.removesuffix(end) for one in text]
        tensors = None if return_tensors == "auto" else return_tensors
        options = {**kwargs, **(processor_kwargs or {}), "return_tensors": tensors}
        conversations, single = as_batch(conversation)
        if own:
            if add_generation_prompt and continue_final_message:
                raise ValueError("choose add_generation_prompt or continue_final_message, not both")
            encoded = [
                self.encode(c, add_generation_prompt, continue_final=continue_final_message)
                for c in conversations
            ]
            batch = self._batch(encoded, **options)
        else:
            text = super().apply_chat_template(
                unshared(conversations), chat_template=chat_template, tokenize=False, **rendered
            )
            slots = [[slots_of(c, kind) for kind in SLOTS] for c in conversations]
            images = [found for found, _ in slots]
            videos = [video for _, found in slots for video in found]
            batch = self(images=images, text=text, videos=videos, **options)
        if return_dict:
            return batch
        ids = batch["input_ids"]
        return ids[0] if single and isinstance(ids, list) else ids

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the library's, in words that both transformers generations read."""
        self._keep_up()
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        # The library keeps the padding side only if it was given when the tokenizer was built.
        portable_tokenizer_config(save_directory, padding_side=self.tokenizer.padding_side)
        return saved

    def _batch(self, encoded: Sequence[Encoded], **options: Any) -> CasaBatch:
        return batch_of(encoded, self.tokenizer, self.image_processor, **options)

    def _holds_place(self, text: str) -> bool:
        return any(kind in SLOTS for kind, _ in self._rendered.read(text))


def portable_tokenizer_config(directory: str | os.PathLike[str], **values: str) -> None:
    """Rewrites what transformers 5 saves of a tokenizer in words that 4.51 knows and 5 reads.

    :param values: further entries.
    """
    path = os.path.join(directory, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        config = {**json.load(file), **values}
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name is new in 5.0
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")


__all__ = [
    "CasaProcessor",
    "ChatTemplate",
    "Encoded",
    "ImageError",
    "TextIds",
    "portable_tokenizer_config",
    "target_size",
]
