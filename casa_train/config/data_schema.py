"""The fields of `data`: prepared sources, streams, budgets, the order of packs.

The state of a plan or a stream holds positions: how many samples of every source were drawn, and
which samples lie in packs under way, with their lengths. A field may change where these still mean
the same under its new value; a test asks for a decision on every field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from casa_train.config.bounds import (
    MOST_COUNT,
    Bound,
    LocalPath,
    NonNegativeFloat,
    NonNegativeInt,
    PathOrHubId,
    PositiveFloat,
    PositiveInt,
    Share,
)
from casa_train.config.resume_marks import FREE, Changeable, Kept

# Why a run that has a checkpoint keeps a field.
ORDER = "positions in the epoch under way are counted along the order that it draws"
LENGTHS = "the packs under way hold samples as they were cut and measured with it"
RATES = "rates hold over all draws of the run, so the mixture would first make up for its past"
PASS = "positions are counted along an order of as many samples"
LANES = "every lane has a position of its own, in row groups dealt to as many"
# Why it may change, if `checkpoint.resume_allow` names it.
BLOCK = "the block of packs under way is used up as it was begun, the next one is made with it"
DIGEST = "the digests of the data are compared, whatever names it"
OPEN_PACKS = "of too many open packs the fullest are finished first"
OPEN_ROW_GROUPS = "of too many open row groups none is opened before they are read"

# Of images, as in modeling/image_processing_casa.py, which the configuration may not import.
TOKEN_SIDE = 28
MAX_PIXELS = 952 * 952
ONE_TOKEN = Bound(
    TOKEN_SIDE**2, MOST_COUNT, f"at least {TOKEN_SIDE**2} ({TOKEN_SIDE}x{TOKEN_SIDE})"
)

Rating = Annotated[int, Bound(1, 5, "a rating 1..5")]


@dataclass
class SourceConfig:
    """One prepared split."""

    path: Annotated[LocalPath, Changeable(DIGEST)] = "???"
    """Directory with `index.arrow`, `meta.json` and shards."""
    weight: Annotated[PositiveFloat | None, Kept(RATES)] = None
    """Relative rate. Either every source has one or none has; then rates follow the sizes."""
    repeats: Annotated[PositiveInt, Kept(RATES)] = 1
    """Passes over this source that count as one epoch (over-sampling)."""
    limit: Annotated[PositiveInt | None, Kept(PASS)] = None
    """Use only the first so many samples. null: all."""


@dataclass
class StreamDatasetConfig:
    """One published dataset of parquet files, read as it is."""

    source: Annotated[PathOrHubId, Changeable(DIGEST)] = "???"
    """Hub id, or a directory with the same files, its README.md included."""
    schema: Annotated[str, Kept(LENGTHS)] = "finevision"
    """How rows are read: a name in `casa_train.data.schemas`."""
    subsets: Annotated[list[str], Changeable(DIGEST)] = field(default_factory=list)
    """Its subsets (configurations of the dataset card); empty: all of them."""
    exclude: Annotated[list[str], Changeable(DIGEST)] = field(default_factory=list)
    """Subsets that stay out."""
    repeats: Annotated[dict[str, PositiveInt], Kept(RATES)] = field(default_factory=dict)
    """By subset: passes that count as one epoch (over-sampling), 1 where it is not named."""
    split: Annotated[str, Changeable(DIGEST)] = "train"
    """The split to read."""
    revision: Annotated[str | None, Changeable(DIGEST)] = None
    """Commit or branch of the hub's repository. null: main, as it is when the run starts; a resumed
    run whose files have changed since is refused."""


@dataclass
class StreamConfig:
    """Training from published datasets without preparing them (`data=finevision_stream`)."""

    datasets: dict[str, StreamDatasetConfig] = field(default_factory=dict)
    """Datasets by name, NAME=null deletes one; used where `data.sources` is empty."""
    lanes: Annotated[PositiveInt, Kept(LANES)] = 256
    """Logical lanes, each with its own row groups and packs; the number of ranks must divide it.
    The order of samples depends on it, so it stays the same for the life of a run."""
    open_units: Annotated[PositiveInt, Changeable(OPEN_ROW_GROUPS)] = 4
    """Row groups that a lane draws rows from at a time: more mix better and take more memory."""
    memory_mib: Annotated[PositiveInt, FREE] = 4096
    """Memory of each loader process for row groups and for the samples of unfinished packs; what
    does not fit is read again. The start prints about how much is needed."""
    attempts: Annotated[PositiveInt, FREE] = 8
    """How often a failed read is tried before the run ends."""
    retry_seconds: Annotated[NonNegativeFloat, FREE] = 1.0
    """Wait after the first failed read; it doubles with every further one, up to a minute."""


@dataclass
class DataConfig:
    """Sources and budgets."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Prepared training sources by name; an experiment or the command line can override an entry,
    or delete it: NAME=null."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """What is read from published datasets instead of prepared sources."""
    validation: Annotated[dict[str, SourceConfig], FREE] = field(default_factory=dict)
    """Held-out splits by name, NAME=null deletes one; validation and evaluation read them, training
    never does."""
    text_tokens: Annotated[int, Bound(2, MOST_COUNT, "at least 2"), Kept(LENGTHS)] = 2048
    """Text budget of a packed sequence."""
    image_tokens: Annotated[int, Bound(2, MOST_COUNT, "at least 2"), Kept(LENGTHS)] = 20480
    """Image-token budget of a packed sequence."""
    max_pixels: Annotated[int, ONE_TOKEN, Kept(LENGTHS)] = MAX_PIXELS
    """Upper bound on the pixels of an image; larger ones are shrunk, aspect kept."""
    min_pixels: Annotated[NonNegativeInt, Kept(LENGTHS)] = 0
    """Smaller images are enlarged to so many pixels at least, aspect kept, by the rule of
    Qwen2.5-VL's own image processor; `max_pixels` and the bound on a video's frames go before it.
    0 enlarges none, but to the side of a token: the sizes of runs from before this field."""
    ratings: Annotated[dict[str, Rating], Kept(LENGTHS)] = field(default_factory=dict)
    """Least rating, 1 to 5, of a turn to be trained, by name: relevance, image_correspondence,
    visual_dependency, formatting. Turns without a rating stay. FineVision's authors found that
    filtering by them hurts, so nothing is filtered unless asked."""
    packs_per_step: Annotated[PositiveInt, Changeable(BLOCK)] = 128
    """Packed sequences of one optimiser step over all ranks; accumulation is this over the world
    size, which must divide it. A resumed run may change it (`checkpoint.resume_allow`)."""
    open_packs: Annotated[PositiveInt, Changeable(OPEN_PACKS)] = 24
    """Packs that best-fit keeps open."""
    balance_block: Annotated[PositiveInt, Changeable(BLOCK)] = 32
    """Steps whose packs are sorted by size together, so that the ranks of a micro-step get packs of
    about the same cost."""
    balance_group: Annotated[PositiveInt, Changeable(BLOCK)] = 64
    """Packs of about the same size that stay together; divides balance_block x packs_per_step. The
    number of ranks is a good value."""
    video_share: Annotated[Share, Changeable(BLOCK)] = 0.25
    """Share of packs that are video, where sources of both modalities are mixed."""
    locality: Annotated[NonNegativeInt, Kept(ORDER)] = 0
    """0 shuffles all samples of a source; n its shards, and then the samples of n shards at a time,
    for object stores."""
    workers: Annotated[NonNegativeInt, FREE] = 2
    """Loader processes of each rank; 0 materialises in the training process."""
    max_bad_share: Annotated[Share, FREE] = 0.01
    """Stop when more than this share of the samples (of at least 1,000) could not be used."""
