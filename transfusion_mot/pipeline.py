"""A diffusers pipeline of a trained model: it paints, captions, speaks, transcribes and continues text."""

import torch
from PIL import Image
from torch import Tensor

from transfusion_mot.config import TEXT
from transfusion_mot.data.audio import Audio
from transfusion_mot.data.images import to_pil
from transfusion_mot.errors import UserError
from transfusion_mot.models.modalities import TokenModality
from transfusion_mot.sampling import pictures, speech
from transfusion_mot.sampling.decoding import Decoding, check_count
from transfusion_mot.sampling.documents import Generators, Item, as_list, one_each
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.sampler import AUTO, Making, OpenDocument
from transfusion_mot.sampling.variations import Pictures, as_pictures

# Generated items: texts, pictures, audio; for other modalities codes, or latents [C, Y, X].
Result = str | Image.Image | Audio | list[int] | Tensor


# Classes are not imported by name: diffusers rejects a custom-pipeline module with two pipeline classes.
class TransfusionPipeline(pictures.PicturePipeline, speech.SpeechPipeline):
    """Generates text, images and speech from each other with one transformer.

    `TransfusionPipeline.from_pretrained(snapshot)("a red apple").images[0]` is a picture.
    """

    @torch.no_grad()
    def caption(
        self,
        images: Pictures,
        prompt: str | list[str] = "",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: Generators = None,
        top_k: int = 0,
    ) -> list[str]:
        """Caption pictures of any size and mode; each is resized to one of the model's sizes as in training.

        Args:
            images: One picture or several.
            prompt: The beginning of every caption, or one for each; the result does not repeat it.
            max_new_tokens: Maximum tokens of a caption.
            temperature: Divides the logits; 0 takes the most probable token.
            top_p: Tokens are drawn from the smallest set with a total probability of at least this, in (0, 1].
            generator: As for images: one for each picture, or one for all.
            top_k: Tokens are drawn from this many most probable ones; 0 is all.

        Raises:
            UserError: An argument is out of its range, or a picture cannot be used.
        """
        shown = as_pictures(images, "images")
        if not shown:
            raise UserError("there is no image to caption; give at least one")
        beginnings = [prompt] * len(shown) if isinstance(prompt, str) else as_list(prompt, "prompt", str)
        if len(beginnings) != len(shown):
            raise UserError(f"there are {len(beginnings)} prompts for {len(shown)} images; give one, or one each")
        self.check_prompts(beginnings)
        documents = [OpenDocument([*pair]) for pair in zip(self._encode(shown), beginnings, strict=True)]
        return self._write(documents, Decoding(max_new_tokens, temperature, top_p, top_k), generator)

    @torch.no_grad()
    def complete(
        self,
        text: str | list[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: Generators = None,
        top_k: int = 0,
    ) -> list[str]:
        """Continue one text or several until their end; arguments as for `caption`.

        Returns:
            The continuations, without `text`.

        Raises:
            UserError: An argument is out of its range.
        """
        texts = as_list(text, "text", str)
        self.check_prompts(texts)
        return self._write(
            [OpenDocument([part]) for part in texts], Decoding(max_new_tokens, temperature, top_p, top_k), generator
        )

    @torch.no_grad()
    def interleave(
        self,
        document: list[str | Image.Image],
        *,
        max_images: int = 1,
        max_new_tokens: int = 64,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        code_temperature: float = 1.0,
        code_top_p: float = 1.0,
        code_top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> list[str | Image.Image]:
        """Continue a document of texts and images; the model decides what follows and when the document ends.

        Args:
            document: The beginning, in reading order; the result does not repeat it.
            max_images: Maximum number of painted images.
            max_new_tokens: Maximum number of written tokens, over all texts.
            num_inference_steps: Reverse steps of an image; None is the pipeline's own number.
            guidance_scale: How strongly an image follows its context; 1 is off, None is the pipeline's own. The
                unconditional prediction has no context, as in training with dropped prompts.
            height, width: Size of all images of the document; None is the size of the first picture.
            temperature, top_p, top_k: For texts, as for `caption`.
            code_temperature, code_top_p, code_top_k: For images, as for painting.
            generator: Randomness of texts and images.

        Returns:
            What follows, in reading order.

        Raises:
            UserError: An argument is out of its range, a picture cannot be used, or the document is longer than any in
                training.
        """
        if not isinstance(document, list):
            raise UserError(f"a document must be a list of texts and images, got {type(document).__name__}")
        check_count(max_images, "max_images", least=0)
        if isinstance(generator, list | tuple):
            raise UserError(f"there are {len(generator)} generators for one document; give a single one")
        (generator,) = one_each(generator, 1)
        for item in document:
            if not isinstance(item, str | Image.Image):
                raise UserError(f"a document is made of texts and PIL images, got {type(item).__name__}")
        if texts := [item for item in document if isinstance(item, str)]:
            self.check_prompts(texts)
        self._check_document(document)
        if max_images:
            self._check_can_paint()
        steps, scale = self.sampling_settings(self.image_modality, num_inference_steps, guidance_scale)
        decoding = Decoding(max_new_tokens, temperature, top_p, top_k)
        guidance = Guidance(scale)
        # As in training, where all images of a document have the size of its first.
        size = self.sizes.painted(height, width, [item for item in document if isinstance(item, Image.Image)][:1])
        whole = OpenDocument([self.encode_item(item, size) for item in document])
        denoise = None if self.codec.kind == "codes" else self._denoiser(self.latent_shape(size), steps, [generator])
        making = self._picture_making(size, max_images, denoise, Decoding(1, code_temperature, code_top_p, code_top_k))
        self._sampler([whole], AUTO, generators=[generator], decoding=decoding, making=making, guidance=guidance).run()
        added = [
            item if isinstance(item, str) else to_pil(self._decode(self._stacked([item.content], size)))[0]
            for item in whole.added
        ]
        self.maybe_free_model_hooks()
        return added

    @torch.no_grad()
    def generate(
        self,
        documents: list[list[Item]],
        target: str,
        *,
        max_new_tokens: int = 64,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        generator: Generators = None,
    ) -> list[Result]:
        """Continue documents with an item of any modality of the model.

        Args:
            documents: Each in reading order: texts, pictures, `Audio`, and `Media` of any modality, whose content is
                the latents [C, Y, X], or `start`, the codes and `end`.
            target: The modality of the new item.
            max_new_tokens: Maximum tokens of a text, or of codes other than pictures; the model decides where they end.
            num_inference_steps: Reverse steps of diffusion; None is the pipeline's own number.
            guidance_scale: How strongly media follow their context; 1 is off, None is the pipeline's own.
            height: For pictures, as for painting; for other latents their height Y.
            width: As `height`.
            temperature: Divides the logits; 0 takes the most probable token. None is 0 for text and 1 for codes.
            top_p, top_k: As for `caption`.
            generator: One for each document, or one for all.

        Returns:
            For each document a text, a picture or `Audio`; for modalities without a codec the codes, or the latents
            [C, Y, X].

        Raises:
            UserError: An argument is out of its range or missing, or a document cannot be used.
        """
        names = self.transformer.architecture.made
        if target not in names:
            raise UserError(f"target is '{target}'; the model has {', '.join(names)}")
        if not documents:
            raise UserError("there is no document; give at least one")
        is_image = self.has_images and target == self.image_modality
        is_audio = self.has_audio and target == self.audio_modality
        if is_image:
            self._check_can_paint()
        if is_audio:
            self.check_can_speak()
        for document in documents:
            self._check_items(document)
            if texts := [item for item in document if isinstance(item, str)]:
                self.check_prompts(texts)
            self._check_document(document)
        given = [OpenDocument([self.encode_item(item) for item in document]) for document in documents]
        if target == TEXT:
            return [*self._write(given, Decoding(max_new_tokens, temperature or 0.0, top_p, top_k), generator)]
        steps, scale = self.sampling_settings(target, num_inference_steps, guidance_scale)
        generators = one_each(generator, len(given))
        modality = self.transformer.modality(target)
        decoding = Decoding(max_new_tokens, 1.0 if temperature is None else temperature, top_p, top_k)
        size = self.sizes.painted(height, width) if is_image else None
        if size is not None:
            denoise = None if self.codec.kind == "codes" else self._denoiser(self.latent_shape(size), steps, generators)
            making = self._picture_making(size, 1, denoise, decoding)
        elif isinstance(modality, TokenModality):
            making = {target: Making(1, 1 + max_new_tokens, decoding=decoding, is_ragged=True)}
        else:
            patch = modality.patch_size
            if height is None or width is None or height % patch or width % patch:
                raise UserError(
                    f"height and width are {height} and {width}; for '{target}' they count latents and must be "
                    f"multiples of {patch}, a patch's side"
                )
            denoise = self._denoiser((modality.latent_channels, height, width), steps, generators)
            making = {target: Making(1, height * width // patch**2, denoise)}
        self._sampler(given, target, generators=generators, making=making, guidance=Guidance(scale)).run()
        contents = [content for document in given for content in document.made]
        self.maybe_free_model_hooks()
        if size is not None:
            return [*to_pil(self._decode(self._stacked(contents, size)))]
        if is_audio:
            return [self.decode_audio(content[1:-1]) for content in contents]
        return [content[1:-1] if isinstance(content, list) else content for content in contents]
