"""Painting: prompts to pictures, variations of pictures, and edits."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from torch import Tensor

from transfusion_mot.config import DEFAULT_STRENGTH
from transfusion_mot.data.audio import Audio
from transfusion_mot.data.images import to_pil
from transfusion_mot.diffusion import Diffusion, Variation
from transfusion_mot.errors import UserError
from transfusion_mot.sampling.decoding import Decoding, check_count
from transfusion_mot.sampling.documents import DocumentPipeline, Generators, as_list, one_each
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.per_row import random_rows
from transfusion_mot.sampling.sampler import Denoise, Making, OpenDocument, Predict
from transfusion_mot.sampling.sizes import Size
from transfusion_mot.sampling.variations import Original, Pictures, load_original, make_variation, one_a_prompt

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Pixels that are decoded at once: a decoder's hidden images are a hundred times as large as its output.
_PIXELS_AT_ONCE = 2**21


class PicturePipeline(DocumentPipeline):
    """Painting methods of a `TransfusionPipeline`."""

    _callback_tensor_inputs = ["latents", "clean"]  # noqa: RUF012
    _interrupt = False

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop the current painting."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Calls of the model for the current or last painting; for callbacks of diffusers."""
        return self._num_timesteps

    @property
    def can_paint(self) -> bool:
        """Whether its codec can decode pictures; `ChameleonVQVAE` only encodes them."""
        return self.has_images and (self.codec.kind == "latents" or self.codec.has_decoder)

    def _check_can_paint(self) -> None:
        if self.image_modality and not self.can_paint:
            raise UserError(
                f"{type(self.vae).__name__} has no decoder, so this model reads pictures but cannot paint them; "
                "caption or complete with it, or train with another codec"
            )

    def enable_vae_slicing(self) -> None:
        """Decode one image at a time, which needs less memory.

        Raises:
            UserError: The codec cannot.
        """
        self._tell_vae("enable_slicing")

    def disable_vae_slicing(self) -> None:
        """Decode many images at once again (the default)."""
        self._tell_vae("disable_slicing")

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles, which needs less memory; the result differs slightly.

        Raises:
            UserError: The codec cannot.
        """
        self._tell_vae("enable_tiling")

    def disable_vae_tiling(self) -> None:
        """Decode images as a whole again (the default)."""
        self._tell_vae("disable_tiling")

    def _tell_vae(self, method: str) -> None:
        try:
            getattr(self.vae, method)()
        except (AttributeError, NotImplementedError):
            raise UserError(f"{type(self.vae).__name__} has no {method}; leave it out") from None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Audio | Sequence[str | Audio],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        *,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guidance_renorm: bool = False,
        generator: Generators = None,
        latents: Tensor | None = None,
        image: Pictures | None = None,
        strength: float = DEFAULT_STRENGTH,
        mask_image: Pictures | None = None,
        code_temperature: float = 1.0,
        code_top_p: float = 1.0,
        code_top_k: int = 0,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents", "clean"),
    ) -> Any:
        """Paint prompts, by diffusion or by writing codes, as the model was trained.

        If pictures are codes, `num_inference_steps` has no effect, and `guidance_interval`, `latents`, `image`,
        `mask_image` and callbacks are refused.

        Args:
            prompt: One prompt or several, each a text or a recording of speech; an empty text paints without prompt.
            num_inference_steps: Reverse steps; None is the pipeline's own number.
            guidance_scale: Classifier-free guidance, 1 is off; None is the pipeline's own.
            num_images_per_prompt: Images for each prompt; they are adjacent in the result.
            height: Height of the images in pixels, a multiple of a patch's side. None is the height at which training
                would read `image`, or else that of the trained size closest to a square. Untrained sizes give a
                warning.
            width: As `height`.
            negative_prompt: Replaces the empty prompt of the unconditional prediction; one, or one for each prompt.
            guidance_interval: Lowest and highest timestep with guidance, from 0 (clean) to 1 (noise); outside of it a
                step takes half the time.
            guidance_rescale: How much of the contrast that guidance adds is removed, from 0 to 1 (arXiv 2305.08891).
            guidance_renorm: Limit the norm of the guided prediction to that of the conditional one.
            generator: A list has one generator for each image. With CPU generators the same seed then gives the same
                image, up to rounding, in any batch and on any device. A single generator draws for all images, one
                after the other. None is torch's global generator.
            latents: Initial noise [B, C, Y, X] in place of a draw; standard normal.
            image: A picture to vary, or one for each prompt, of any size; it is resized to the painting's size as in
                training.
            strength: Noise level to start from, above 0 (the image is kept) and at most 1 (the image is replaced).
            mask_image: A mask of the image's size: white is repainted, black is kept, pixel by pixel.
            code_temperature: For codes: divides the logits; 0 takes the most probable code.
            code_top_p: Codes are drawn from the smallest set with a total probability of at least this, in (0, 1].
            code_top_k: Codes are drawn from this many most probable ones; 0 is all.
            output_type: `pil`, `np` (float [B, H, W, 3] in [0, 1]), `pt` (float [B, 3, H, W] in [0, 1]) or `latent`
                (normalised latents [B, C, Y, X], or codes [B, Y, X]).
            return_dict: False returns a tuple.
            callback_on_step_end: Called as (pipeline, step, timestep, tensors) after every reverse step; a function, or
                a `PipelineCallback` or `MultiPipelineCallbacks` of diffusers. The tensors are [B, C, Y, X]: `latents`
                are the current ones, `clean` the model's estimate without noise, for `decode_latents`. If the callback
                returns `latents`, they replace the current ones. If it sets `pipeline._interrupt`, painting stops, and
                the current latents are decoded.
            callback_on_step_end_tensor_inputs: Names of the tensors that it receives.

        Returns:
            An `ImagePipelineOutput` whose `images` has one for each prompt and each of `num_images_per_prompt`.

        Raises:
            UserError: An argument is out of its range.
        """
        prompts = as_list(prompt, "prompt", str | Audio)
        numbers = self._numbers(prompts, num_images_per_prompt)
        negatives = self._negatives(negative_prompt, len(prompts))
        steps, scale = self.sampling_settings(self.image_modality, num_inference_steps, guidance_scale)
        guidance = Guidance(scale, interval=guidance_interval, rescale=guidance_rescale, renorm=guidance_renorm)
        if not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise UserError(f"strength is {strength}; it must be above 0 and at most 1")
        if mask_image is not None and image is None:
            raise UserError("there is a mask_image and no image; give the image that it belongs to")
        original = None
        if image is None:
            size = self.sizes.painted(height, width)
        else:
            self._refuse_for_codes("image")
            original = load_original(
                image,
                mask_image,
                sizes=self.sizes,
                height=height,
                width=width,
                repeats=numbers,
                device=self._execution_device,
            )
            size = original.size
        given = [self.encode_item(prompt) for prompt in prompts]
        images = self._paint(
            [OpenDocument([given[number]], negatives[number]) for number in numbers],
            size,
            guidance,
            num_inference_steps=steps,
            generator=generator,
            latents=latents,
            original=original,
            strength=strength,
            decoding=Decoding(1, code_temperature, code_top_p, code_top_k),
            output_type=output_type,
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def edit(
        self,
        image: Pictures,
        instruction: str | list[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float = 1.5,
        num_images_per_prompt: int = 1,
        *,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guidance_renorm: bool = False,
        generator: Generators = None,
        latents: Tensor | None = None,
        code_temperature: float = 1.0,
        code_top_p: float = 1.0,
        code_top_k: int = 0,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents", "clean"),
    ) -> Any:
        """Edit pictures by instruction, with a model that was trained on editing pairs.

        The model reads the whole picture and paints a new one. (The argument `image` of painting works with any model:
        it starts from the noised picture.)

        Args:
            image: The picture to edit, of any size, or one for each instruction; each is read as in training.
            instruction: One instruction or several.
            num_inference_steps: As for painting.
            guidance_scale: How strongly the result follows the instruction; 1 is off, None is the pipeline's own.
            image_guidance_scale: How strongly it follows the picture; 1 is off (InstructPix2Pix, arXiv 2211.09800,
                equation 3). With both guidances a step takes three forwards.
            num_images_per_prompt: Results for each instruction; they are adjacent.
            height, width: Size of the result in pixels; None is the size at which training would read the picture.
            negative_prompt: Replaces the empty instruction of the prediction from the picture alone.
            guidance_interval, guidance_rescale, guidance_renorm: As for painting.
            generator, latents: As for painting.
            code_temperature, code_top_p, code_top_k: For codes, as for painting.
            output_type, return_dict: As for painting.
            callback_on_step_end, callback_on_step_end_tensor_inputs: As for painting.

        Returns:
            An `ImagePipelineOutput` whose `images` has one for each instruction and each of `num_images_per_prompt`.

        Raises:
            UserError: The model was not trained on editing pairs, or an argument is out of its range.
        """
        self.check_can_edit()
        if not isinstance(instruction, str | Sequence):
            raise UserError(
                f"instruction must be a text or several, got {type(instruction).__name__}; "
                "the picture comes first: edit(image, instruction)"
            )
        instructions = [instruction] if isinstance(instruction, str) else list(instruction)
        numbers = self._numbers(instructions, num_images_per_prompt)
        negatives = self._negatives(negative_prompt, len(instructions))
        pictures = one_a_prompt(image, "image", len(instructions))
        for text in (*instructions, *negatives):
            # The limit of training, where the result follows the instruction.
            self._check_document([pictures[0], text, pictures[0]])
        steps, scale = self.sampling_settings(self.image_modality, num_inference_steps, guidance_scale)
        guidance = Guidance(
            scale,
            interval=guidance_interval,
            rescale=guidance_rescale,
            renorm=guidance_renorm,
            image_scale=float(image_guidance_scale),
        )
        size = self.sizes.painted(height, width, pictures)
        encoded = self._encode(pictures, size)
        images = self._paint(
            [OpenDocument([encoded[number], instructions[number]], negatives[number]) for number in numbers],
            size,
            guidance,
            num_inference_steps=steps,
            generator=generator,
            latents=latents,
            decoding=Decoding(1, code_temperature, code_top_p, code_top_k),
            output_type=output_type,
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_can_edit(self) -> None:
        """Refuse to edit with a model that was not trained on editing pairs.

        Raises:
            UserError: It was not trained on editing pairs.
        """
        if not self.config.trained_on_edits:
            raise UserError(
                "this model was not trained on editing pairs; train it on some (source_image_column of a source), or "
                "vary the picture with image and strength"
            )

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Normalised latents [B, C, Y, X], such as a callback's `clean`, or codes [B, Y, X] => pictures."""
        return to_pil(self._decode(latents))

    def _numbers(self, prompts: Sequence[str | Audio], num_images_per_prompt: int) -> list[int]:
        """Check the prompts => the index of the prompt of each result."""
        self.check_prompts(prompts)
        check_count(num_images_per_prompt, "num_images_per_prompt")
        return [number for number in range(len(prompts)) for _ in range(num_images_per_prompt)]

    def _negatives(self, negative_prompt: str | list[str] | None, num_prompts: int) -> list[str]:
        """Check the negative prompts => one for each prompt."""
        negatives = [negative_prompt or ""] if not isinstance(negative_prompt, list) else negative_prompt
        if len(negatives) not in (1, num_prompts):
            raise UserError(
                f"there are {len(negatives)} negative prompts for {num_prompts} prompts; give one, or one for each"
            )
        self.check_prompts(negatives)
        return negatives * (num_prompts // len(negatives))

    def _refuse_for_codes(self, what: str) -> None:
        if self.codec.kind == "codes":
            raise UserError(f"{what} is given, but this model writes its pictures as codes; leave it out")

    def _paint(
        self,
        documents: list[OpenDocument],
        size: Size,
        guidance: Guidance,
        *,
        num_inference_steps: int,
        generator: Generators,
        latents: Tensor | None,
        decoding: Decoding,
        output_type: str,
        callback: Callback | None,
        callback_tensors: Sequence[str],
        original: Original | None = None,
        strength: float = 1.0,
    ) -> Any:
        """Paint the next picture of each document and return it in the requested form."""
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is '{output_type}'; known: {', '.join(OUTPUT_TYPES)}")
        if output_type != "latent":
            self._check_can_paint()
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            callback_tensors = callback.tensor_inputs
        if unknown := sorted(set(callback_tensors) - set(self._callback_tensor_inputs)):
            raise UserError(
                f"callback_on_step_end asks for the tensors {', '.join(unknown)}; known: "
                f"{' and '.join(self._callback_tensor_inputs)}"
            )
        by_diffusion = {
            "guidance_interval": guidance.interval != (0.0, 1.0),
            "latents": latents is not None,
            "callback_on_step_end": callback is not None,
        }
        for name in (name for name, given in by_diffusion.items() if given):
            self._refuse_for_codes(name)
        generators = one_each(generator, len(documents))
        denoise = None
        if self.codec.kind == "latents":
            noise = self._initial_noise(latents, generators, self.latent_shape(size)).to(self._execution_device)
            variation = None
            if original is not None:
                variation = make_variation(original, strength, self.codec, noise.dtype)

            def denoise(predict: Predict, _: list[int]) -> Tensor:
                return self._denoise(
                    predict,
                    noise,
                    num_inference_steps,
                    generators=generators,
                    variation=variation,
                    callback=callback,
                    callback_tensors=callback_tensors,
                )

        making = self._picture_making(size, 1, denoise, decoding)
        self._sampler(documents, self.image_modality, generators=generators, making=making, guidance=guidance).run()
        contents = [content for document in documents for content in document.made]
        images = self._finish(self._stacked(contents, size), output_type, original)
        self.maybe_free_model_hooks()
        return images

    def _picture_making(self, size: Size, most: int, denoise: Denoise | None, decoding: Decoding) -> dict[str, Making]:
        """Settings for making a maximum number of pictures of a document: by `denoise`, or if it is None by writing
        codes."""
        if not most:
            return {}
        rows, columns = self.grid(size)
        if denoise is None:
            return {self.image_modality: Making(most, 1 + rows * columns, decoding=decoding)}
        patch = self.transformer.architecture.modalities[self.image_modality].patch_size
        return {self.image_modality: Making(most, rows * columns // patch**2, denoise)}

    def _denoiser(
        self, shape: tuple[int, int, int], num_inference_steps: int, generators: list[torch.Generator | None]
    ) -> Denoise:
        """A function that makes latents of a shape [C, Y, X] in documents with these generators."""

        def denoise(predict: Predict, rows: list[int]) -> Tensor:
            own = [generators[row] for row in rows]
            noise = self._initial_noise(None, own, shape).to(self._execution_device)
            return self._denoise(predict, noise, num_inference_steps, generators=own)

        return denoise

    def _denoise(
        self,
        predict: Predict,
        noise: Tensor,
        num_inference_steps: int,
        *,
        generators: list[torch.Generator | None],
        variation: Variation | None = None,
        callback: Callable[..., dict[str, Any] | None] | None = None,
        callback_tensors: Sequence[str] = (),
    ) -> Tensor:
        """The reverse process with its progress bar and callback: noise => clean latents [B, C, Y, X]."""
        # Attributes that diffusers' callbacks read and set.
        self._interrupt = False
        diffusion = Diffusion(self.scheduler)
        times = diffusion.inference_timesteps(num_inference_steps, noise.device)
        # More than the number of steps if a solver calls the model twice in a step.
        calls = len(times) - (0 if variation is None else variation.first_step(times))
        self._num_timesteps = calls
        with self.progress_bar(total=calls) as bar:

            def on_step(step: int, latents: Tensor, clean: Callable[[], Tensor]) -> bool:
                if callback is not None:
                    ways = {"latents": lambda: latents, "clean": clean}
                    tensors = {name: ways[name]() for name in callback_tensors}
                    replaced = callback(self, step, self.scheduler.timesteps[step], tensors)
                    if replaced and replaced.get("latents") is not None:
                        latents.copy_(replaced["latents"])
                bar.update()
                return self._interrupt

            drawing = [own for own in generators if own is not None]
            return diffusion.sample(predict, noise, num_inference_steps, drawing or None, on_step, variation)

    def _stacked(self, contents: list[Any], size: Size) -> Tensor:
        """Contents of pictures => latents [B, C, Y, X] or codes [B, Y, X]."""
        if self.codec.kind == "latents":
            return torch.stack(contents)
        codes = torch.tensor([content[1:-1] for content in contents], device=self._execution_device)
        return codes.view(len(contents), *self.grid(size))

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents or codes => pixels [B, 3, H, W] in [-1, 1], some images at a time.

        Raises:
            UserError: The latents are not finite. Decoded, they would be black pictures.
        """
        codec = self.codec
        if not latents.isfinite().all():
            raise UserError(
                "the painted latents are not finite; try more num_inference_steps, another scheduler, or a transformer "
                "in float32"
            )
        at_once = max(1, _PIXELS_AT_ONCE // (latents.shape[-2] * latents.shape[-1] * codec.downsampling**2))
        return torch.cat([codec.decode(part) for part in latents.split(at_once)])

    def _initial_noise(
        self, latents: Tensor | None, generators: Sequence[torch.Generator | None], latent_shape: tuple[int, int, int]
    ) -> Tensor:
        """Initial noise in float32, or float64 for a model in float64; a solver's steps need this precision."""
        shape = (len(generators), *latent_shape)
        if latents is None:
            latents = random_rows(torch.randn, latent_shape, generators)
        elif latents.shape != shape:
            raise UserError(f"latents have the shape {list(latents.shape)}; they must have {list(shape)}")
        return latents.to(torch.promote_types(self.transformer.dtype, torch.float32))

    def _finish(self, latents: Tensor, output_type: str, original: Original | None) -> Any:
        if output_type == "latent":
            return latents
        pixels = self._decode(latents)
        if original is not None:
            pixels = original.put_back(pixels)
        if output_type == "pil":
            return to_pil(pixels)
        pixels = pixels / 2 + 0.5
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()
