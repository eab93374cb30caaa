"""Paint prompts, edit a picture, caption images, go on with texts, speak and transcribe with a trained model.

    python sample.py "a red apple" "an octopus"
    python sample.py --checkpoint runs/emoji --prompts-file prompts.txt --num-images 4 --output samples/all
    python sample.py --checkpoint runs/edit --edit apple.png "make it green" "add a top hat"
    python sample.py --checkpoint runs/emoji --caption photo.jpg drawing.png
    python sample.py --checkpoint runs/emoji --task auto "A story in pictures."
    python sample.py --checkpoint runs/chameleon_speech --task speech "a red apple" --output apple.wav
    python sample.py --checkpoint runs/chameleon_speech --transcribe apple.wav
    accelerate launch sample.py --checkpoint runs/coco --prompts-file coco-30k.txt --output samples/coco-30k

Pictures are written as PNG files, with grid.png, which shows the first of them side by side, and metadata.jsonl, which
makes the folder an image folder as Hugging Face datasets and evaluate/clip_score.py read it. Another command with the
same --output adds its results behind those that are there, and grid.png shows the last one's. The same command goes on
where it was interrupted. accelerate shares the work over GPUs.

Every result has a seed of its own, made from --seed, its prompt and its number among the results of that prompt: it
stays the same whatever other prompts there are, in whatever order, and whatever --batch-size or number of GPUs. It is
written down as image_seed, and TransfusionPipeline.from_pretrained(SNAPSHOT)(PROMPT,
generator=torch.Generator().manual_seed(IMAGE_SEED)) paints the picture again.
"""

from transfusion_mot.cli.options import parse_arguments
from transfusion_mot.errors import exit_on_user_error


def main() -> None:
    """Do what the command line says."""
    options = parse_arguments(__doc__ or "")
    # PyTorch takes seconds to load. --help and mistakes in the options do not wait for it.
    from transfusion_mot.cli.sampling import run

    run(options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
