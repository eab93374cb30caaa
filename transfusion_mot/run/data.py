"""The data of a run: codecs, tokenizer, training sources and held-out sources."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from accelerate import Accelerator

from transfusion_mot.codecs.base import Codec
from transfusion_mot.codecs.load import load_codec
from transfusion_mot.config import TEXT, RunConfig
from transfusion_mot.data.encoding import check_media_sizes, check_positions
from transfusion_mot.data.mixture import Source, Sources, open_documents, training_texts, with_encoded
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.row_arrays import CodeNoise
from transfusion_mot.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.training.float8 import check_float8
from transfusion_mot.training.state import refuse_other_tokenizer


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        codecs: Codec of each modality but text.
        tokenizer: The text tokenizer.
        sources: Training documents, with encoded media.
        held_out: Documents of the same sources that are never trained on.
        encoder: Encodes latents that are not cached.
    """

    codecs: dict[str, Codec]
    tokenizer: TextTokenizer
    sources: Sources
    held_out: Sources
    encoder: OnlineEncoder

    @classmethod
    def open(cls, config: RunConfig, accelerator: Accelerator, codecs: dict[str, Codec], state: Path | None) -> Self:
        """Open everything; called by all processes.

        The main process indexes the sources and trains the tokenizer; then the others load both. All processes share
        the encoding of media.

        Args:
            config: The run's configuration.
            accelerator: The run's accelerator.
            codecs: As `load_codecs`.
            state: Training state to resume from, or None.

        Raises:
            UserError: A source or tokenizer cannot be read, or they or a codec do not fit the configuration.
        """
        check_media_sizes(config.data, codecs, config.model)
        check_positions(config.data, codecs, config.model)
        if config.training.float8:
            check_float8(config, accelerator, codecs)
        readers = config.model.readers.values()
        with accelerator.main_process_first():
            documents = open_documents(config.data, "train", readers)
            held_out = open_documents(config.data, "held_out", readers)
            tokenizer = open_tokenizer(config, documents, state=state, is_main_process=accelerator.is_main_process)
        return cls(
            codecs,
            tokenizer,
            with_encoded(documents, config.data, codecs, config.codecs, accelerator, all_documents=True),
            with_encoded(held_out, config.data, codecs, config.codecs, accelerator),
            OnlineEncoder.of_model(config.model, codecs, config.codecs),
        )

    def packer(self, config: RunConfig) -> Packer:
        """The packer that builds the rows of the run."""
        return Packer(
            self.sources,
            self.tokenizer,
            config.data,
            config.model,
            num_lanes=config.training.num_rows,
            seed=config.training.seed,
            timesteps_from_uniform=Diffusion.from_config(config.diffusion).timesteps_from_uniform,
            code_noise={
                name: CodeNoise(prob, codec.codebook_size)
                for name, codec in self.codecs.items()
                if codec.kind == "codes" and (prob := config.model.modalities[name].code_noise_prob)
            },
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Vocabulary size or latent channels of each modality."""
        # The ids after the codes are the start and the end of a span.
        media = {
            name: codec.latent_channels if codec.kind == "latents" else codec.codebook_size + 2
            for name, codec in self.codecs.items()
        }
        return {TEXT: self.tokenizer.vocab_size, **media}


def load_codecs(config: RunConfig, device: torch.device) -> dict[str, Codec]:
    """Codec of each modality but text.

    Raises:
        UserError: One cannot be read, or does not fit its objective.
    """
    return {
        name: load_codec(codec, config.model.modalities[name].objective, device)
        for name, codec in config.codecs.items()
    }


def open_tokenizer(
    config: RunConfig, documents: list[Source], *, state: Path | None, is_main_process: bool
) -> TextTokenizer:
    """The tokenizer of the resumed run, else the configured one, else a newly trained one.

    The main process saves it into the run folder first; the others load it from there.
    """
    folder, modalities = Path(config.output_dir) / "tokenizer", config.model.made
    if not is_main_process:
        return load_tokenizer(str(folder), modalities)
    if state is not None:
        kept = state.parent.parent / "tokenizer"
        tokenizer = load_tokenizer(str(kept), modalities)
        refuse_other_tokenizer(config.tokenizer, tokenizer, state)
        if kept.resolve() == folder.resolve():
            return tokenizer
    elif config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer.path, modalities, config.model.has_pretrained_text)
    else:
        tokenizer = train_tokenizer(training_texts(documents), config.tokenizer.vocab_size, modalities)
    tokenizer.save(folder)
    return tokenizer
