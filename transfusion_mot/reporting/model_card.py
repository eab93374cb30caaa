"""The README of a snapshot: its model, training data, quality and use."""

import json
from collections.abc import Collection

import yaml
from huggingface_hub import ModelCardData

from transfusion_mot.config import TEXT, RunConfig, to_dict
from transfusion_mot.data.mixture import Sources, counter
from transfusion_mot.training.metrics import CAPTION_LOSS, TOKEN_UNIT, VALIDATION, Lines, loss_units

_REPOSITORY_TAGS = ["transfusion", "mixture-of-transformers", "text-generation"]
# Tasks of the hub by the media of a model; the model is listed under the first one.
_TASKS = {"image": ["text-to-image", "image-to-text"], "audio": ["text-to-speech", "automatic-speech-recognition"]}


def model_card(
    config: RunConfig,
    *,
    parameters: int,
    sources: Sources,
    seen: dict[str, int],
    lines: Lines,
    step: int,
    prompt: str,
    media: Collection[str] = ("image",),
    base: str | None = None,
) -> str:
    """A model card in the form of the Hugging Face hub.

    Args:
        config: Configuration of the run.
        parameters: Number of parameters.
        sources: Training data.
        seen: Counters of the run.
        lines: Metrics of the run.
        step: Number of finished steps.
        prompt: Prompt of the example.
        media: Media of its codecs: `image`, `audio` or both.
        base: Base snapshot of a low-rank adapter.
    """
    model, training = config.model, config.training
    tasks = [task for medium, own in _TASKS.items() if medium in media for task in own]
    tags = [*_REPOSITORY_TAGS, *tasks, *([] if base is None else ["lora"])]
    header = ModelCardData(library_name="diffusers", pipeline_tag=tasks[0], tags=tags).to_yaml()
    towers = "; ".join(
        f"`{name}`: width {tower.hidden_size}, feed-forward {tower.intermediate_size}"
        for name, tower in model.towers.items()
    )
    is_mixture = len({modality.tower for modality in model.modalities.values()}) > 1
    kind = "Mixture-of-Transformers" if is_mixture else "dense transformer"
    modalities = "\n".join(f"| modality `{name}` | {_described(name, config)} |" for name in model.stream_order)
    sizes = ", ".join(f"{width} x {height}" for height, width in config.data.image_sizes)
    facts = f"| image sizes | {sizes} px |\n" if "image" in media else ""
    facts += f"| longest audio | {config.data.max_audio_seconds:g} s |\n" if "audio" in media else ""
    items = "".join(f" and {seen.get(f'{name}_items', 0):,} {name} items" for name in config.codecs)
    codecs = ", ".join(f"`{codec.path}`" for codec in config.codecs.values())
    return f"""---
{header.strip()}
---

# {config.output_dir.rstrip("/").split("/")[-1]}

One transformer over {" and ".join(model.made)} ([Transfusion](https://arxiv.org/abs/2408.11039),
[Mixture-of-Transformers](https://arxiv.org/abs/2411.04996)), trained with `transfusion_mot`. Averaged weights (decay
{training.ema_decay}) after {step:,} of {training.num_steps:,} steps.

| | |
| --- | --- |
| model | {kind} of {parameters / 1e6:,.1f} M parameters in {model.num_layers} layers of {model.num_heads} heads |
| towers | {towers} |
{modalities}
{facts}| batch | {training.num_rows} rows |

## Use

```python
from transfusion_mot.pipeline import TransfusionPipeline

{_loading(base)}
{_uses(prompt, media)}
text = pipeline.complete("Once upon a time")[0]
```

## Data

| source | weight | documents | tokens | media | epochs |
| --- | ---: | ---: | ---: | ---: | ---: |
{_source_rows(sources, seen)}

All rows together: {seen.get(f"{TEXT}_slots", 0):,} {TEXT} tokens{items}.

## Measured

{_measured(lines, step)}

## Licence

Not stated yet. It follows from the data above and from the codecs ({codecs}): add `license` to the head of this file.

## Configuration

<details>
<summary>All settings of the run</summary>

```yaml
{yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).strip()}
```

</details>
"""


def _loading(base: str | None) -> str:
    """The lines of code that load the model."""
    if base is None:
        return 'pipeline = TransfusionPipeline.from_pretrained("PATH_OR_NAME_OF_THIS_MODEL")'
    return (
        f"# A low-rank adapter: its base model is needed, too.\n"
        f"pipeline = TransfusionPipeline.from_pretrained({json.dumps(base, ensure_ascii=False)})\n"
        'pipeline.load_lora_weights("PATH_OR_NAME_OF_THIS_ADAPTER")'
    )


def _uses(prompt: str, media: Collection[str]) -> str:
    """Lines of code that use a prompt."""
    quoted, lines = json.dumps(prompt, ensure_ascii=False), []
    if "image" in media:
        lines += [f"image = pipeline({quoted}).images[0]", "caption = pipeline.caption(image)[0]"]
    if "audio" in media:
        lines += [f"audio = pipeline.speak({quoted})[0]", "transcript = pipeline.transcribe(audio)[0]"]
    return "\n".join(lines)


def _described(name: str, config: RunConfig) -> str:
    """Objective, tower and slots of a modality."""
    modality, slots = config.model.modalities[name], config.data.slots[name]
    if modality.objective == "read":
        return f"clean {modality.reads} items, which are only read; tower `{modality.tower}`; {slots:,} items a row"
    common = f"tower `{modality.tower}`, loss weight {modality.loss_weight:g}"
    if modality.objective == "next_token":
        return f"next-token prediction; {common}; {slots:,} tokens a row"
    is_flow = config.diffusion.scheduler.startswith("FlowMatch")
    prediction = "flow" if is_flow else config.diffusion.scheduler_args.get("prediction_type", "epsilon")
    patch = f"{modality.patch_size} x {modality.patch_size}"
    return (
        f"diffusion, {prediction} prediction, `{config.diffusion.scheduler}`; {common}; patches of {patch} latents, "
        f"adapter `{modality.adapter}`; {slots:,} items a row"
    )


def _source_rows(sources: Sources, seen: dict[str, int]) -> str:
    epochs = sources.epochs(seen)
    rows = []
    for name, source in zip(sources.names, sources.sources, strict=True):
        numbers = (f"{seen.get(counter(name, what), 0):,}" for what in ("documents", "tokens", "items"))
        rows.append(f"| {name.replace('|', ' ')} | {source.weight:g} | {' | '.join(numbers)} | {epochs[name]:.2f} |")
    return "\n".join(rows)


def _measured(lines: Lines, step: int) -> str:
    """The last training and held-out losses up to a step."""
    rows = []
    for name, unit in {**loss_units(lines), CAPTION_LOSS: TOKEN_UNIT}.items():
        training, held_out = (
            next(((line[key], line["step"]) for line in reversed(lines) if key in line and line["step"] <= step), None)
            for key in (name, f"{VALIDATION}{name}")
        )
        if training or held_out:
            cells = (f"{found[0]:.4f} (step {found[1]:,})" if found else "-" for found in (training, held_out))
            rows.append(f"| {name.replace('_', ' ')} in {unit} | {' | '.join(cells)} |")
    if not rows:
        return "Nothing yet."
    return "\n".join(["| | training | held out |", "| --- | ---: | ---: |", *rows])
