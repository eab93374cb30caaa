"""The README of a snapshot: what the model is, what it was trained on, how good it is, and how to use it."""

import json
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from transfusion_mot.config import RunConfig, to_dict
from transfusion_mot.data.mixture import Sources, counter

_REPOSITORY_TAGS = ["transfusion", "mixture-of-transformers", "text-to-image", "image-to-text", "text-generation"]
_RATIOS = {
    "text_loss": "nats per token",
    "caption_loss": "nats per token",
    "diffusion_loss": "squared error per element",
}


def model_card(
    config: RunConfig, parameters: int, sources: Sources, seen: dict[str, int], lines: list[dict[str, Any]], step: int
) -> str:
    """A model card in the form of the Hugging Face hub.

    Args:
        config: Of the run.
        parameters: Of the model.
        sources: What it was trained on.
        seen: The counters of the run.
        lines: Of the run's metrics.
        step: Steps done.
    """
    model, training = config.model, config.training
    header = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=_REPOSITORY_TAGS).to_yaml()
    towers = "; ".join(
        f"`{name}`: width {tower.hidden_size}, feed-forward {tower.intermediate_size}"
        for name, tower in model.towers.items()
    )
    kind = "Mixture-of-Transformers" if len(set(model.modalities.values())) > 1 else "dense transformer"
    is_flow = config.diffusion.scheduler.startswith("FlowMatch")
    objective = "flow" if is_flow else config.diffusion.scheduler_args.get("prediction_type", "epsilon")
    patch = f"{model.patch_size} x {model.patch_size}"
    sizes = ", ".join(f"{width} x {height}" for height, width in config.data.image_sizes)
    prompt = next(iter(training.sample_prompts), "a red apple")
    return f"""---
{header.strip()}
---

# {config.output_dir.rstrip("/").split("/")[-1]}

One transformer that writes text and paints images: next-token prediction on text, diffusion on the latents of images
([Transfusion](https://arxiv.org/abs/2408.11039)), trained with `transfusion_mot`. Averaged weights (decay
{training.ema_decay}) after {step:,} of {training.num_steps:,} steps.

| | |
| --- | --- |
| model | {kind} of {parameters / 1e6:,.1f} M parameters in {model.num_layers} layers of {model.num_heads} heads |
| towers | {towers} |
| images | {sizes} px, patches of {patch} latents, adapter `{model.image_adapter}` |
| objective of images | {objective} prediction, `{config.diffusion.scheduler}` |
| batch | {training.num_rows} rows of {config.data.text_slots} text slots and {config.data.images_per_row} images |

## Use

```python
from transfusion_mot.pipeline import TransfusionPipeline

pipeline = TransfusionPipeline.from_pretrained("PATH_OR_NAME_OF_THIS_MODEL")
image = pipeline({json.dumps(prompt, ensure_ascii=False)}, guidance_scale={config.diffusion.guidance_scale:g}).images[0]
caption = pipeline.caption(image)[0]
text = pipeline.complete("Once upon a time")[0]
```

## Data

| source | weight | documents | text tokens | images | epochs |
| --- | ---: | ---: | ---: | ---: | ---: |
{_source_rows(sources, seen)}

All rows together: {seen.get("text_tokens", 0):,} text tokens and {seen.get("images", 0):,} images.

## Measured

{_measured(lines, step)}

## Licence

Not stated yet. It follows from the data above and from the autoencoder (`{config.autoencoder.path}`): add `license` to
the head of this file.

## Configuration

<details>
<summary>All settings of the run</summary>

```yaml
{yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).strip()}
```

</details>
"""


def _source_rows(sources: Sources, seen: dict[str, int]) -> str:
    epochs = sources.epochs(seen)
    rows = []
    for name, source in zip(sources.names, sources.sources, strict=True):
        numbers = (f"{seen.get(counter(name, what), 0):,}" for what in ("documents", "tokens", "images"))
        rows.append(f"| {name.replace('|', ' ')} | {source.weight:g} | {' | '.join(numbers)} | {epochs[name]:.2f} |")
    return "\n".join(rows)


def _measured(lines: list[dict[str, Any]], step: int) -> str:
    """The last losses up to a step, in training and held out."""
    rows = []
    for name, ratio in _RATIOS.items():
        training, held_out = (
            next(((line[key], line["step"]) for line in reversed(lines) if key in line and line["step"] <= step), None)
            for key in (name, f"validation/{name}")
        )
        if training or held_out:
            cells = (f"{found[0]:.4f} (step {found[1]:,})" if found else "-" for found in (training, held_out))
            rows.append(f"| {name.replace('_', ' ')} in {ratio} | {' | '.join(cells)} |")
    if not rows:
        return "Nothing yet."
    return "\n".join(["| | training | held out |", "| --- | ---: | ---: |", *rows])
