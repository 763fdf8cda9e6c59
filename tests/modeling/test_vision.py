"""The vision tower against transformers' own: outputs, gradients, what a frozen prefix keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from casa_train.modeling.vision_qwen import QwenTower
from tests.helpers.tiny import bytes_kept, random_image, randomise, tiny_vision_config

# Rows and columns of 28 pixels. 4 x 4 is one window of 112 pixels; other sides cut windows short.
MIXED = ((1, 1), (2, 3), (4, 4), (5, 9), (7, 4), (8, 12), (1, 10))


def towers(depth: int = 4) -> tuple[QwenTower, Qwen2_5_VisionTransformerPretrainedModel]:
    """Our tower and the library's with the same random weights."""
    config = tiny_vision_config(depth)
    ours = QwenTower(config)
    randomise(ours, torch.Generator().manual_seed(0))
    return ours, library_tower(config, ours)


def library_tower(
    config: Qwen2_5_VLVisionConfig, ours: QwenTower
) -> Qwen2_5_VisionTransformerPretrainedModel:
    """The library's tower with our weights; strict, so the parameter names are the same."""
    plain = Qwen2_5_VisionTransformerPretrainedModel._from_config(
        config, attn_implementation="eager"
    )
    plain.load_state_dict(ours.state_dict(), strict=True)
    return plain


def images_of(grids: tuple[tuple[int, int], ...] = MIXED, seed: int = 0) -> list[Tensor]:
    """Noise images of these rows and columns of image tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [random_image(generator, *grid) for grid in grids]


def library_inputs(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Patches and grid as the library's image processor cuts them from uint8 pixels."""
    processor = Qwen2VLImageProcessor(do_resize=False)
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    batch = processor(images=arrays, return_tensors="pt", input_data_format="channels_last")
    return batch["pixel_values"], batch["image_grid_thw"]


def library_tokens(tower: Qwen2_5_VisionTransformerPretrainedModel, images: list[Tensor]) -> Tensor:
    """(N, C) merged tokens of the library's tower, whose return type changed between releases."""
    patches, grid = library_inputs(images)
    out = tower(patches, grid_thw=grid)
    tokens: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return tokens


@torch.no_grad()
def test_outputs_equal_the_librarys_over_mixed_sizes() -> None:
    ours, plain = towers()
    images = images_of()
    expected = library_tokens(plain, images)
    assert expected.std() > 0.1  # the tolerance is small beside what is compared
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("grid", MIXED, ids=str)
def test_an_image_does_not_depend_on_its_neighbours(grid: tuple[int, int]) -> None:
    """Alone, between others and in the library's tower it gives the same tokens."""
    ours, plain = towers()
    (image,) = images_of((grid,), seed=7)
    alone = ours([image])
    assert alone.shape == (grid[0] * grid[1], ours.config.out_hidden_size)
    others = images_of()
    before = sum(ours.token_counts(others[:3]))
    between = ours([*others[:3], image, *others[3:]])[before : before + len(alone)]
    torch.testing.assert_close(between, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, library_tokens(plain, [image]), rtol=0, atol=1e-4)


def test_parameter_names_are_the_librarys() -> None:
    ours, plain = towers()
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == shapes
    assert not list(ours.buffers())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_pixels_of_any_dtype_give_the_same_tokens(dtype: torch.dtype) -> None:
    """0..255 are exact in all of them."""
    ours, _ = towers()
    images = images_of(MIXED[:3])
    assert torch.equal(ours([image.to(dtype) for image in images]), ours(images))


def test_token_counts_follow_the_grid_and_refuse_other_sides() -> None:
    ours, _ = towers()
    assert ours.token_counts(images_of()) == [rows * columns for rows, columns in MIXED]
    for shape in ((3, 28, 30), (3, 14, 28), (1, 28, 28), (28, 28)):
        with pytest.raises(ValueError, match=r"image 1 .*28"):
            ours.token_counts([torch.zeros(3, 28, 28), torch.zeros(shape)])


def loss_of(tokens: Tensor) -> Tensor:
    """A scalar that weighs every token differently."""
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    return (tokens * weights).sum()


@pytest.mark.parametrize("last_blocks", [-1, 1, 3, 4])
def test_trainable_blocks_get_the_plain_towers_gradients(last_blocks: int) -> None:
    """The last blocks and the merger; nothing before them."""
    ours, plain = towers()
    images = images_of()
    loss_of(library_tokens(plain, images)).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}

    ours.set_trainable(last_blocks)
    loss_of(ours(images)).backward()
    first = 0 if last_blocks < 0 else 4 - last_blocks
    for name, parameter in ours.named_parameters():
        if name.startswith("patch_embed."):
            trains = last_blocks < 0
        elif name.startswith("blocks."):
            trains = int(name.split(".")[1]) >= first
        else:
            trains = True
        assert parameter.requires_grad == trains, name
        if trains:
            scale = expected[name].abs().max()
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * scale)
        else:
            assert parameter.grad is None, name


def test_no_trainable_block_freezes_the_whole_tower() -> None:
    ours, _ = towers()
    ours.set_trainable(0)
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours(images_of(MIXED[:2])).requires_grad


@pytest.mark.parametrize("last_blocks", [-2, 5])
def test_more_blocks_than_there_are_is_refused(last_blocks: int) -> None:
    ours, _ = towers()
    with pytest.raises(ValueError, match=f"train_last_blocks is {last_blocks}; the tower has 4"):
        ours.set_trainable(last_blocks)


def saved_bytes(depth: int, last_blocks: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    # The last block sees windows only, whatever the depth: towers differ in frozen blocks alone.
    tower = QwenTower(tiny_vision_config(depth, fullatt_block_indexes=[0]))
    randomise(tower, torch.Generator().manual_seed(0))
    tower.set_trainable(last_blocks)
    return bytes_kept(tower, images_of(MIXED[:4]))


def test_frozen_blocks_keep_no_activations() -> None:
    """Memory grows with the blocks that train, not with the frozen ones before them."""
    one, two, three = (saved_bytes(5, n) for n in (1, 2, 3))
    assert saved_bytes(2, 1) == one
    assert three - two == two - one > 0
    assert saved_bytes(5, -1) > saved_bytes(2, -1) > one
    assert saved_bytes(5, 0) == 0
