"""HPSv2's published file, against the network of open_clip written with torch's own attention."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image
from tiny_clip import save_tiny_clip
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPTokenizer

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation import open_clip
from transfusion_mot.evaluation.clip_score import preference_score
from transfusion_mot.evaluation.scoring import load_preferences

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 16, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return hidden + self.mlp(self.ln_2(hidden))


class Blocks(nn.Module):
    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(count))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            hidden = block(hidden, mask)
        return hidden


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(32))
        self.positional_embedding = nn.Parameter(torch.zeros(17, 32))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(32), Blocks(32, 2), nn.LayerNorm(32)
        self.proj = nn.Parameter(torch.zeros(32, 12))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), 1, -1)
        hidden = self.transformer(self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding))
        return self.ln_post(hidden[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Names and computation as in open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.transformer = Visual(), Blocks(48, 3)
        self.token_embedding, self.ln_final = nn.Embedding(514, 48), nn.LayerNorm(48)
        self.positional_embedding = nn.Parameter(torch.zeros(32, 48))
        self.text_projection = nn.Parameter(torch.zeros(48, 12))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    def text(self, ids: Tensor) -> Tensor:
        mask = torch.full((32, 32), -torch.inf).triu(1)
        hidden = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        # The end token has the highest id.
        return self.ln_final(hidden)[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection


@pytest.fixture
def of_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "_WIDTHS", (32, 48))


@pytest.mark.usefixtures("of_toy_size")
def test_hpsv2_from_its_published_file(tmp_path: Path) -> None:
    network = OpenClip().eval()
    with torch.no_grad():
        randomise(network.requires_grad_(False))
    torch.save({"state_dict": network.half().state_dict(), "epoch": 3}, tmp_path / "HPS.pt")
    network = network.float()
    folder = str(save_tiny_clip(tmp_path / "clip"))
    (clip,) = load_preferences(None, str(tmp_path / "HPS.pt"), [folder], CPU).values()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    texts = ["a cat", "two dogs on a table", ""]
    metric = preference_score("HPSv2 x100", [Image.fromarray(image) for image in images], texts, clip)
    # The mean and deviation of CLIP's own pictures; ids are filled up with zeros behind the end token.
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[
        ..., None, None
    ]
    pixels = (torch.from_numpy(images).movedim(3, 1) / 255 - mean) / std
    ids = torch.zeros(3, 32, dtype=torch.long)
    for row, found in zip(ids, CLIPTokenizer.from_pretrained(folder)(texts)["input_ids"], strict=True):
        row[: len(found)] = torch.tensor(found)
    cosines = (normalize(network.visual(pixels), dim=1) * normalize(network.text(ids), dim=1)).sum(dim=1)
    np.testing.assert_allclose(metric.scores, 100 * cosines.numpy(), atol=1e-3)
    assert cosines.std() > 0.03
    assert metric.protocol["clip"] == "HPS.pt"


def test_another_clip_is_refused(tmp_path: Path) -> None:
    torch.save(OpenClip().state_dict(), tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"holds a CLIP of the widths \(32, 48\); HPSv2's are \(1280, 1024\)"):
        load_preferences(None, str(tmp_path / "clip.pt"), [], CPU)


@pytest.mark.usefixtures("of_toy_size")
def test_other_files_are_refused(tmp_path: Path) -> None:
    state = OpenClip().state_dict()
    folder = str(save_tiny_clip(tmp_path / "clip"))
    file = tmp_path / "weights.pt"
    torch.save({name: state[name] for name in state if name != "visual.ln_post.bias"}, file)
    with pytest.raises(UserError, match=r"other weights than HPSv2's CLIP, first 'vision_model\.post_layernorm\.bias'"):
        load_preferences(None, str(file), [folder], CPU)
    torch.save({**state, "score.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"other weights than HPSv2's CLIP, first 'score\.weight'"):
        load_preferences(None, str(file), [folder], CPU)
    torch.save({"unet.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="does not hold a CLIP in open_clip's format"):
        load_preferences(None, str(file), [folder], CPU)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="does not hold a CLIP in open_clip's format"):
        load_preferences(None, str(file), [folder], CPU)
    torch.save(state, file)
    with pytest.raises(UserError, match=r"has no tokenizer, .* give the folder of a CLIP model with --clip"):
        load_preferences(None, str(file), ["./no/clip"], CPU)
