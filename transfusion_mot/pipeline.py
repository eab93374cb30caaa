"""What a training run is for: a diffusers pipeline that paints prompts, captions images and goes on with text."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transfusion_mot.autoencoder import Autoencoder, check_image_size
from transfusion_mot.data.images import load_image, to_pil, to_pixels
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.images import read_prompts
from transfusion_mot.sampling.slots import random_rows
from transfusion_mot.sampling.text import Decoding, caption_latents, complete

Generators = torch.Generator | list[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MODEL_CARD = "README.md"


class TransfusionPipeline(DiffusionPipeline):
    """Text to image, image to text and text to text with one transformer.

    `TransfusionPipeline.from_pretrained(snapshot)("a red apple").images[0]` is a picture.

    Args:
        transformer: The model.
        vae: Autoencoder of the latents it was trained on.
        scheduler: diffusers scheduler that reverses the noise schedule it was trained with; another one that fits comes
            from `transfusion_mot.diffusion.make_sampling_scheduler`.
        tokenizer: Its tokenizer, `TextTokenizer.hf`.
        image_size: Height and width in pixels of the images it was trained on.
        max_prompt_tokens: Longest prompt it can have seen, without special tokens; None is no limit.
        num_inference_steps: Reverse steps if a call names none.
        guidance_scale: Classifier-free guidance if a call names none; 1 is off.

    Raises:
        UserError: The parts do not belong together.
    """

    model_cpu_offload_seq = "transformer->vae"

    # diffusers takes arguments without a default for components: every setting needs one.
    def __init__(
        self,
        transformer: TransfusionMoT,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerFast,
        image_size: int = 64,
        max_prompt_tokens: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer)
        self.register_to_config(
            image_size=image_size,
            max_prompt_tokens=max_prompt_tokens,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        self.text_tokenizer = TextTokenizer(tokenizer)
        # Text of the README.md that goes with it.
        self.model_card: str | None = None
        self._check_components()

    def _check_components(self) -> None:
        model = self.transformer.config
        if self.autoencoder.latent_channels != model.latent_channels:
            raise UserError(
                f"the vae has {self.autoencoder.latent_channels} latent channels and the transformer was trained on "
                f"{model.latent_channels}; use the vae that the transformer was trained with"
            )
        if self.text_tokenizer.vocab_size != model.vocab_size:
            raise UserError(
                f"the tokenizer has {self.text_tokenizer.vocab_size} ids and the transformer was trained on "
                f"{model.vocab_size}; use the tokenizer that the transformer was trained with"
            )
        check_image_size(self.config.image_size, self.autoencoder, self.transformer.architecture.patch_size)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a snapshot folder, or a pipeline of that name from the Hugging Face hub; arguments as in diffusers.

        Raises:
            UserError: It is not there, is another pipeline, is incomplete, or its parts do not belong together.
        """
        path = pretrained_model_name_or_path
        index = Path(path) / "model_index.json"
        if os.path.isdir(path) and not index.is_file():
            raise UserError(f"{path} is no snapshot: it has no model_index.json; give a folder snapshots/step-N")
        try:
            class_name = json.loads(index.read_text())["_class_name"] if index.is_file() else cls.__name__
            if class_name != cls.__name__:
                raise UserError(f"{path} holds a {class_name}; a {cls.__name__} is needed")
            pipeline = super().from_pretrained(path, **kwargs)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"no pipeline can be loaded from {path}: {reason}") from None
        card = Path(path) / MODEL_CARD
        pipeline.model_card = card.read_text() if card.is_file() else None
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in diffusers, with the model card."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.model_card is not None:
            (Path(save_directory) / MODEL_CARD).write_text(self.model_card)

    def _upload_folder(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """What `push_to_hub` of diffusers ends with."""
        card = Path(working_dir) / MODEL_CARD
        # diffusers has written over ours: with the card that the repository has, which stays, or with one of its own
        # that says nothing.
        if self.model_card is not None and "automatically generated" in card.read_text():
            card.write_text(self.model_card)
        return super()._upload_folder(working_dir, *args, **kwargs)

    @property
    def autoencoder(self) -> Autoencoder:
        """The VAE with its normalisation of latents."""
        return Autoencoder(self.vae)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse what the model cannot read.

        Raises:
            UserError: No prompt, something that is not text, or a prompt longer than any in training.
        """
        if not prompts:
            raise UserError("there is no prompt; give at least one")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(f"a prompt must be text, got {type(prompt).__name__}")
            length, limit = len(self.text_tokenizer.encode(prompt)), self.config.max_prompt_tokens
            if limit is not None and length > limit:
                shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
                raise UserError(
                    f"the prompt '{shown}' has {length} tokens; the model was trained on at most {limit}: shorten it"
                )

    def sampling_settings(self, num_inference_steps: int | None, guidance_scale: float | None) -> tuple[int, float]:
        """What a call with these arguments uses: None is replaced by the pipeline's own.

        Raises:
            UserError: A value is out of its range.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        most_steps = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most_steps:
            raise UserError(f"num_inference_steps is {steps}; it must be from 1 to {most_steps}")
        scale = float(self.config.guidance_scale if guidance_scale is None else guidance_scale)
        if not math.isfinite(scale):
            raise UserError(f"guidance_scale is {scale}; it must be a finite number, 1 for no guidance")
        return steps, scale

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Self, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Any:
        """Paint prompts.

        Args:
            prompt: One prompt or several; an empty one paints without prompt.
            num_inference_steps: Reverse steps; None is the pipeline's own number.
            guidance_scale: Classifier-free guidance, 1 is off; None is the pipeline's own.
            num_images_per_prompt: Images of each prompt; they stand together in the result.
            generator: A list has one generator per image, and each draws for its image alone: with CPU generators the
                same seed gives the same image, up to rounding, whatever else is in the batch and on every device. A
                single generator draws for all images, one after the other. None is torch's global generator.
            latents: Initial noise [B, C, Y, X] in place of a draw; standard normal.
            output_type: `pil`, `np` (float [B, H, W, 3] in [0, 1]), `pt` (float [B, 3, H, W] in [0, 1]) or `latent`
                (normalised latents [B, C, Y, X]).
            return_dict: False returns a tuple.
            callback_on_step_end: Called as (pipeline, step, timestep, {"latents": latents}) after every reverse step;
                `latents` in what it returns take the place of the current ones.

        Returns:
            An `ImagePipelineOutput` whose `images` has one for each prompt and each of `num_images_per_prompt`.

        Raises:
            UserError: An argument is out of its range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.check_prompts(prompts)
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1")
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        steps, scale = self.sampling_settings(num_inference_steps, guidance_scale)
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is '{output_type}'; known: {', '.join(OUTPUT_TYPES)}")
        generators = _one_each(generator, len(prompts))
        device = self._execution_device
        noise = self._initial_noise(latents, generators).to(device)

        predict = read_prompts(self.transformer, self.text_tokenizer, prompts, scale, noise.shape[-1], device)
        scheduler = self.scheduler
        # For the number of timesteps: a second-order scheduler has two in most steps.
        scheduler.set_timesteps(steps, device=device)
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:

            def on_step(step: int, current: Tensor) -> None:
                if callback_on_step_end is not None:
                    replaced = callback_on_step_end(self, step, scheduler.timesteps[step], {"latents": current})
                    if replaced and replaced.get("latents") is not None:
                        current.copy_(replaced["latents"])
                bar.update()

            drawing = [own for own in generators if own is not None]
            clean = Diffusion(scheduler).sample(predict, noise, steps, drawing or None, on_step)
        images = self._finish(clean, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def caption(
        self,
        images: Image.Image | list[Image.Image],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: Generators = None,
    ) -> list[str]:
        """Describe pictures of any size and mode; they are brought to the model's size by cropping their centre.

        Args:
            images: One picture or several.
            max_new_tokens: Most tokens of a caption.
            temperature: Divides the logits; 0 takes the most probable token.
            top_p: Tokens are drawn from the fewest whose probabilities sum to at least this, in (0, 1].
            generator: As for images: one for each picture, or one for all.

        Raises:
            UserError: An argument is out of its range, or a picture cannot be used.
        """
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        if not pictures:
            raise UserError("there is no image to caption; give at least one")
        decoding = Decoding(max_new_tokens, temperature, top_p)
        generators = _one_each(generator, len(pictures))
        images_uint8 = np.stack([load_image(picture, self.config.image_size) for picture in pictures])
        mean, _ = self.autoencoder.encode(to_pixels(images_uint8).to(self._execution_device))
        captions = caption_latents(self.transformer, self.text_tokenizer, mean, decoding, generators)
        self.maybe_free_model_hooks()
        return captions

    def complete(
        self,
        text: str | list[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: Generators = None,
    ) -> list[str]:
        """Go on with one text or several until their end; arguments as for `caption`.

        Returns:
            What was written, without `text`.

        Raises:
            UserError: An argument is out of its range.
        """
        texts = [text] if isinstance(text, str) else list(text)
        self.check_prompts(texts)
        decoding = Decoding(max_new_tokens, temperature, top_p)
        generators = _one_each(generator, len(texts))
        device = self._execution_device
        continuations = complete(self.transformer, self.text_tokenizer, texts, decoding, generators, device)
        self.maybe_free_model_hooks()
        return continuations

    def _initial_noise(self, latents: Tensor | None, generators: Sequence[torch.Generator | None]) -> Tensor:
        """Initial noise in float32, or float64 for a model in float64; a solver's steps are too small for less."""
        side = self.config.image_size // self.autoencoder.downsampling
        shape = (self.autoencoder.latent_channels, side, side)
        if latents is None:
            latents = random_rows(torch.randn, shape, generators)
        elif latents.shape != (len(generators), *shape):
            raise UserError(f"latents have the shape {list(latents.shape)}; needed is {[len(generators), *shape]}")
        return latents.to(torch.promote_types(self.transformer.dtype, torch.float32))

    def _finish(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        pixels = self.autoencoder.decode(latents)
        if output_type == "pil":
            return to_pil(pixels)
        pixels = pixels / 2 + 0.5
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()


def _one_each(generator: Generators, count: int) -> list[torch.Generator | None]:
    """A generator for each of `count` rows."""
    if not isinstance(generator, list):
        return [generator] * count
    if len(generator) != count:
        raise UserError(
            f"there are {len(generator)} generators for {count} results; give one for each, or a single one"
        )
    return list(generator)
