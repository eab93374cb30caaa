"""Named model sizes and batch shapes of the benchmarks."""

from dataclasses import dataclass

from transfusion_mot.config import TEXT, ModalityConfig, ModelConfig, SourceConfig, TowerConfig

# The modality of the emoji.
IMAGE = SourceConfig().modality


@dataclass(frozen=True)
class Size:
    """A model: the field names of `ModelConfig` and `TowerConfig`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 32000

    def model(self, dense: bool) -> ModelConfig:
        """Two towers of this size, or one that both modalities share."""
        tower = TowerConfig(self.hidden_size, self.intermediate_size)
        text, image = ("shared", "shared") if dense else (TEXT, IMAGE)
        return ModelConfig(
            towers={text: tower, image: tower},
            modalities={
                TEXT: ModalityConfig(text),
                IMAGE: ModalityConfig(image, "diffusion", loss_weight=5.0),
            },
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
        )


@dataclass(frozen=True)
class Layout:
    """A batch on one device: rows of text slots and images."""

    rows: int
    text_slots: int
    images: int
    image_size: int = 128

    @property
    def slots(self) -> int:
        """Slots of a row; the autoencoder makes 4 x 4 pixels one latent, the model 2 x 2 latents one patch."""
        return self.text_slots + self.images * (self.image_size // 8) ** 2


# The Transfusion paper's sizes with heads of 128.
SIZES = {
    "tiny": Size(32, 2, 2, 16, 48, 512),
    "163m": Size(768, 16, 6, 128, 2048),
    "760m": Size(1536, 24, 12, 128, 4096),
    "1.4b": Size(2048, 24, 16, 128, 5632),
}
LAYOUTS = {
    "tiny": Layout(2, 64, 2, 32),
    "163m": Layout(32, 1024, 4),
    "760m": Layout(8, 2048, 8),
    "1.4b": Layout(4, 2048, 8),
    "short": Layout(128, 64, 1),
    "images-10": Layout(8, 3840, 1),
    "images-50": Layout(8, 2048, 8),
    "images-90": Layout(8, 512, 14),
}
