"""SigLIP2's tower against transformers' own: outputs, gradients, what a frozen prefix keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

from casa_train.modeling.towers import TOWERS, build_tower
from casa_train.modeling.vision_siglip import SiglipTower
from tests.helpers.tiny import bytes_kept, random_image, randomise, tiny_siglip_config

# Rows and columns of 32 pixels. The learned positions are 5 x 5 patches of 16 pixels: they are
# stretched along some sides and shrunk, with antialiasing, along others.
MIXED = ((1, 1), (2, 3), (4, 4), (5, 9), (7, 1), (1, 10), (2, 3))
ENCODER = {"encoder.layers.": "blocks.", "embeddings.": "patch_embed.", "post_": "merger.post_"}


def named_as_theirs(name: str) -> str:
    for theirs, ours in ENCODER.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def towers(depth: int = 3) -> tuple[SiglipTower, nn.Module]:
    """Our tower and the encoder of the library's with the same random weights."""
    config = tiny_siglip_config(depth)
    ours = build_tower(config)
    assert isinstance(ours, SiglipTower)
    randomise(ours, torch.Generator().manual_seed(0))
    whole = Siglip2VisionModel._from_config(config, attn_implementation="eager").eval()
    theirs = getattr(whole, "vision_model", whole)  # newer releases have one class less
    named = {named_as_theirs(name): value for name, value in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert not unexpected and all(name.startswith("head.") for name in missing)
    return ours, whole


def images_of(grids: tuple[tuple[int, int], ...] = MIXED, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [random_image(generator, *grid, side=32) for grid in grids]


def library_tokens(model: nn.Module, images: list[Tensor]) -> list[Tensor]:
    """For each image the library's patches as a grid: (rows, columns, C), out of one padded batch.

    Pixels are cut and scaled as its image processor does.
    """
    rows = []
    for image in images:
        pixels = (image.float() / 255 - 0.5) / 0.5
        h, w = image.shape[1] // 16, image.shape[2] // 16
        rows.append(pixels.reshape(3, h, 16, w, 16).permute(1, 3, 2, 4, 0).reshape(h * w, -1))
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    shapes = torch.tensor([[i.shape[1] // 16, i.shape[2] // 16] for i in images])
    out = model(batch, pixel_attention_mask=mask.long(), spatial_shapes=shapes).last_hidden_state
    grids = shapes.tolist()
    return [one[: h * w].reshape(h, w, -1) for one, (h, w) in zip(out, grids, strict=True)]


def unshuffled(grid: Tensor) -> Tensor:
    """(rows, columns, C) of patches -> (tokens, 4 * C): each cell's four side by side."""
    h, w, _ = grid.shape
    cells = [
        torch.cat([grid[y, x], grid[y, x + 1], grid[y + 1, x], grid[y + 1, x + 1]])
        for y in range(0, h, 2)
        for x in range(0, w, 2)
    ]
    return torch.stack(cells)


def expected_tokens(model: nn.Module, images: list[Tensor]) -> Tensor:
    return torch.cat([unshuffled(grid) for grid in library_tokens(model, images)])


@torch.no_grad()
def test_outputs_equal_the_librarys_over_mixed_sizes() -> None:
    ours, theirs = towers()
    images = images_of()
    expected = expected_tokens(theirs, images)
    assert expected.std() > 0.1  # the tolerance is small beside what is compared
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("grid", MIXED[:-1], ids=str)
def test_positions_are_torchs_resized_ones(grid: tuple[int, int]) -> None:
    """Bilinear with antialiasing, as transformers 4.51 asks torch for."""
    ours, _ = towers(1)
    h, w = 2 * grid[0], 2 * grid[1]
    layout = ours._lay_out([(16 * h, 16 * w)], torch.device("cpu"))
    found = ours.patch_embed.position_embedding(layout.axes, layout.of_image)
    table = ours.patch_embed.position_embedding.weight.reshape(1, 5, 5, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(
        table, size=(h, w), mode="bilinear", align_corners=False, antialias=True
    )
    in_cells = resized[0].reshape(-1, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).flatten(0, 3)
    torch.testing.assert_close(found, in_cells, rtol=0, atol=1e-5)


@torch.no_grad()
def test_positions_are_not_rounded_by_autocast() -> None:
    """As a Trainer in bf16 runs the model; autocast leaves the library's resize alone."""
    ours, _ = towers(1)
    layout = ours._lay_out([(64, 96)], torch.device("cpu"))
    positions = ours.patch_embed.position_embedding
    wanted = positions(layout.axes, layout.of_image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positions(layout.axes, layout.of_image), wanted)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours() -> None:
    ours, _ = towers()
    (image,) = images_of(((3, 5),), seed=7)
    others = images_of()
    alone, before = ours([image]), sum(ours.token_counts(others[:3]))
    assert alone.shape == (15, 128)
    between = ours([*others[:3], image, *others[3:]])[before : before + len(alone)]
    torch.testing.assert_close(between, alone, rtol=0, atol=1e-5)


def test_token_counts_follow_the_grid_and_refuse_other_sides() -> None:
    ours, _ = towers(1)
    assert ours.token_side == 32
    assert ours.token_counts(images_of()) == [rows * columns for rows, columns in MIXED]
    with pytest.raises(ValueError, match=r"image 0 .*multiples of 32"):
        ours.token_counts([torch.zeros(3, 28, 28)])


def loss_of(tokens: Tensor) -> Tensor:
    """A scalar that weighs every token differently."""
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    return (tokens * weights).sum()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("last_blocks", [-1, 1, 3, 0])
def test_trainable_blocks_get_the_librarys_gradients(last_blocks: int, checkpointed: bool) -> None:
    """The last blocks and the last norm; nothing before them."""
    ours, theirs = towers()
    images = images_of()
    loss_of(expected_tokens(theirs, images)).backward()
    plain = getattr(theirs, "vision_model", theirs)
    expected = {name: p.grad for name, p in plain.named_parameters()}

    ours.set_trainable(last_blocks)
    tokens = ours(images, checkpointed=checkpointed)
    assert tokens.requires_grad == (last_blocks != 0)
    if last_blocks:
        loss_of(tokens).backward()
    for name, parameter in ours.named_parameters():
        if name.startswith("blocks."):
            trains = last_blocks < 0 or int(name.split(".")[1]) >= 3 - last_blocks
        else:
            trains = last_blocks < 0 or (name.startswith("merger.") and last_blocks > 0)
        assert parameter.requires_grad == trains, name
        if trains:
            wanted = expected[named_as_theirs(name)]
            # A key's bias moves all scores of a query alike: its gradient is rounding alone.
            scale = 1.0 if name.endswith("k_proj.bias") else float(wanted.abs().max())
            torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=2e-5 * scale)
        else:
            assert parameter.grad is None, name


def saved_bytes(depth: int, last_blocks: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    tower = build_tower(tiny_siglip_config(depth))
    tower.set_trainable(last_blocks)
    return bytes_kept(tower, images_of(MIXED[:4]))


def test_frozen_blocks_keep_no_activations() -> None:
    one, two, three = (saved_bytes(4, n) for n in (1, 2, 3))
    assert saved_bytes(2, 1) == one
    assert three - two == two - one > 0
    assert saved_bytes(4, 0) == 0 < saved_bytes(4, -1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 14}, r"patch_size 14 times 2 patches must be 32"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'.*gelu_pytorch_tanh"),
        ({"num_patches": 24}, r"num_patches is 24.*a square"),
        ({"num_channels": 1}, r"num_channels is 1"),
        ({"num_attention_heads": 5}, r"num_attention_heads is 5.*a divisor of hidden_size"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0.1"),
    ],
    ids=str,
)
def test_settings_that_no_published_tower_has_are_refused(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build_tower(tiny_siglip_config(1, **options))


def test_graphs_of_frames_are_left_to_the_tower_they_were_measured_on() -> None:
    assert [name for name, tower in TOWERS.items() if tower.repeatable] == ["qwen2_5_vl"]
