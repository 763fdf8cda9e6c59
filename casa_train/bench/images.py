"""Encoded images to what the model reads: our path beside Pillow + transformers' processor."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from transformers.utils import is_torchvision_available, logging

from casa_train.bench._benchmark import Benchmark, Report, describe_machine, machine
from casa_train.bench._timing import interleaved
from casa_train.config.bounds import local_path
from casa_train.errors import UserError
from casa_train.io.tables import aligned
from casa_train.modeling.image_processing_casa import (
    MAX_PIXELS,
    SIDE,
    CasaImageProcessor,
    ImageError,
)

METHOD = """\
Both paths start from the same encoded bytes and give what their model reads. Ours: Pillow decodes,
torch resizes, out come uint8 (3, H, W); the device normalises and cuts patches. Theirs: Pillow
decodes, transformers' Qwen2-VL image processor resizes, normalises and cuts float32 patches, every
pixel twice for its two frames. It runs as documented for speed: on torchvision where that is
installed, else in its Pillow form, a call an image.
The two take turns over all images, in one process; the time is the median over the repeats. The
difference is between our pixels and theirs, de-normalised, of 255 levels.
Without --files the images are rendered: random fields from coarse to fine, grain and lines of text,
saved as JPEG.
"""
CPU = torch.device("cpu")


class Theirs:
    """Pillow and transformers' Qwen2-VL image processor.

    :param max_pixels: of a resized image, as for ours.
    """

    def __init__(self, max_pixels: int) -> None:
        name = "Qwen2VLImageProcessor"
        if is_torchvision_available():
            if transformers.__version__.startswith("4."):
                name += "Fast"  # transformers 5 has no other on torchvision
            self.note = f"{name} on torchvision"
        else:
            if not transformers.__version__.startswith("4."):
                name += "Pil"
            self.note = f"{name}; torchvision, which its fast form needs, is not installed"
        size = {"shortest_edge": SIDE**2, "longest_edge": max_pixels}
        if transformers.__version__.startswith("4."):
            size = {"min_pixels": SIDE**2, "max_pixels": max_pixels}
            self.processor = getattr(transformers, name)(**size)
        else:
            self.processor = getattr(transformers, name)(size=size)

    def __call__(self, data: bytes) -> Any:
        """`pixel_values`, patches of one image, and `image_grid_thw`."""
        with Image.open(io.BytesIO(data)) as image:
            return self.processor(images=[image], return_tensors="pt")

    def pixels(self, batch: Any) -> Tensor:
        """(3, H, W) float levels from 0 to 255, of the image that the patches were cut from."""
        _, rows, columns = batch["image_grid_thw"][0].tolist()
        merge, patch = self.processor.merge_size, self.processor.patch_size
        normalised: Tensor = rearrange(
            batch["pixel_values"],
            "(r c i j) (k t y x) -> t k (r i y) (c j x)",
            r=rows // merge,
            c=columns // merge,
            i=merge,
            j=merge,
            k=3,
            y=patch,
            x=patch,
        )[0]
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        return (normalised * std + mean) * 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--files", nargs="+", type=local_path, help="images to read instead of rendering"
    )
    parser.add_argument("--images", type=int, default=8, help="rendered images (default: 8)")
    parser.add_argument("--width", type=int, default=1600, help="of those (default: 1600)")
    parser.add_argument("--height", type=int, default=1200, help="of those (default: 1200)")
    parser.add_argument("--quality", type=int, default=90, help="of their JPEG (default: 90)")
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="of a resized image (default: 952 * 952)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both (default: 1)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7)")


def run(arguments: argparse.Namespace) -> Report:
    """Measures both paths.

    :raises UserError: arguments out of range, or files that are no images.
    """
    for name in ("images", "width", "height", "quality", "threads", "repeats"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    logging.set_verbosity_error()  # transformers' advice on its processors
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        return _measure(arguments)
    except (ImageError, OSError, ValueError) as error:
        raise UserError(f"the images cannot be measured: {error}") from error
    finally:
        torch.set_num_threads(before)


def render(count: int, width: int, height: int, quality: int, seed: int) -> list[bytes]:
    """JPEG files that compress about as photographs with writing in them do."""
    generator = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        field = generator.normal(0, 6, (height, width, 1)) + np.zeros(3)  # grain
        for cells, amplitude in ((4, 128), (16, 64), (64, 32), (256, 16)):
            shape = (max(1, cells * height // width), cells, 3)
            coarse = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
            smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
            field += (np.asarray(smooth) / 255 - 0.5) * amplitude
        image = Image.fromarray((field + 128).clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for top in range(10, height, 120):
            pen.text((10, top), "Portez ce vieux whisky au juge blond 0123456789 " * 4, "black")
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return files


def _measure(arguments: argparse.Namespace) -> Report:
    if arguments.files:
        files = [path.read_bytes() for path in arguments.files]
    else:
        shape = arguments.width, arguments.height
        files = render(arguments.images, *shape, arguments.quality, arguments.seed)
    ours, theirs = CasaImageProcessor(arguments.max_pixels), Theirs(arguments.max_pixels)
    sizes = {"ours": 0, "transformers": 0}
    means, largest = [], 0.0
    for data in files:
        pixels, batch = ours.load(data), theirs(data)
        difference = (pixels - theirs.pixels(batch)).abs()
        means.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
        sizes["ours"] += pixels.nbytes
        sizes["transformers"] += sum(value.nbytes for value in batch.values())
    seconds = interleaved(
        {
            "ours": lambda: [ours.load(data) for data in files],
            "transformers": lambda: [theirs(data) for data in files],
        },
        CPU,
        arguments.repeats,
    )
    count, cores = len(files), arguments.threads
    rates = {name: count / taken / cores for name, taken in seconds.items()}
    found = {
        "images": count,
        "encoded_bytes": sum(map(len, files)) / count,
        "images_per_second_and_core": rates,
        "bytes_per_image": {name: size / count for name, size in sizes.items()},
        "times_as_many_images": rates["ours"] / rates["transformers"],
        "share_of_bytes": sizes["ours"] / sizes["transformers"],
        "mean_difference": sum(means) / count,
        "largest_difference": largest,
        "transformers_processor": theirs.note,
    }
    facts = machine(CPU, torch.uint8)
    text = "\n".join(
        [
            describe_machine(facts),
            f"{count} {'files' if arguments.files else 'rendered images'} of "
            f"{found['encoded_bytes'] / 1e3:,.0f} kB each, "
            f"to at most {arguments.max_pixels:,} pixels",
            f"transformers: {theirs.note}",
            "",
            _table(found),
            "",
            f"pixels differ by {found['mean_difference']:.4f} of 255 levels on average, at most by "
            f"{largest:.0f}",
        ]
    )
    options = {k: v for k, v in vars(arguments).items() if k not in ("name", "json", "files")}
    return Report(text, {"machine": facts, "arguments": options, **found})


def _table(found: dict[str, Any]) -> str:
    rates, sizes = found["images_per_second_and_core"], found["bytes_per_image"]
    rows: list[Sequence[str]] = [("", "images/s and core", "ms an image", "MB an image")]
    for name in rates:
        cells = rates[name], 1000 / rates[name], sizes[name] / 1e6
        rows.append((name, f"{cells[0]:.1f}", f"{cells[1]:.1f}", f"{cells[2]:.2f}"))
    ratios = found["times_as_many_images"], found["share_of_bytes"]
    rows.append(("ours / transformers", f"{ratios[0]:.2f}", "", f"1/{1 / ratios[1]:.1f}"))
    return aligned(rows)


BENCHMARK = Benchmark(
    measures="images a second and core, and bytes an image, beside transformers' image processor",
    description=METHOD,
    add_arguments=add_arguments,
    run=run,
)
