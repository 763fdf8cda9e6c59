"""A fusion mechanism of a user's own, as text: the file and the YAML that tests write somewhere."""

from __future__ import annotations

from pathlib import Path

FILE = '''
"""Text asks the images of its window with the block's own queries."""

from torch import nn

from .block import plain_block, project
from .fusion import register
from .windowed import WindowedMechanism, linear_like, read_windows


@register
class Toy(WindowedMechanism):
    name = "toy"
    options = {"every": 1, "strength": 1.0}

    def make_layer(self, layer, layer_idx):
        return ToyLayer(layer, layer_idx) if self.has_fusion(layer_idx) else None

    def run_layer(self, layer, h, images, context):
        fusion, width = layer.fusion, layer.self_attn.head_dim
        if fusion is not None:
            text = project(layer.self_attn, layer.input_layernorm(h), width, keys=False)
            seen = project(fusion, images, width, queries=False)
            read, _ = read_windows(fusion.layer_idx, text, seen, context)
            h = h + self.fusion["strength"] * fusion.o_proj(read)
        return plain_block(layer, h, context), images

    def count_layer(self, work, layer_idx, h, z):
        if self.has_fusion(layer_idx):
            width, q_width = work.sizes.width, work.sizes.q_width
            q = work.text_linear(width, q_width, False, work.norm(h))
            read = work.cross_attention(q, work.image_keys(True, z))
            h |= work.text_linear(q_width, width, True, read)
        return work.plain_block(h), z


class ToyLayer(nn.Module):
    def __init__(self, layer, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.k_proj = linear_like(layer.self_attn.k_proj)
        self.v_proj = linear_like(layer.self_attn.v_proj)
        self.o_proj = linear_like(layer.self_attn.o_proj)
'''

YAML = """\
mechanism: toy
every: 2
strength: 0.5
"""


def write_toy(folder: Path) -> tuple[Path, Path]:
    """Writes both; returns the Python file and what `--config-dir` takes."""
    (folder / "conf" / "fusion").mkdir(parents=True)
    (folder / "conf" / "fusion" / "toy.yaml").write_text(YAML)
    (folder / "toy.py").write_text(FILE)
    return folder / "toy.py", folder / "conf"
