"""Paint prompts, edit a picture, caption images, continue texts, speak and transcribe with a trained model.

    python sample.py "a red apple" "an octopus"
    python sample.py --checkpoint runs/emoji --prompts-file prompts.txt --num-images 4 --output samples/all
    python sample.py --checkpoint runs/edit --edit apple.png "make it green" "add a top hat"
    python sample.py --checkpoint runs/emoji --caption photo.jpg drawing.png
    python sample.py --checkpoint runs/emoji --task auto "A story in pictures."
    python sample.py --checkpoint runs/chameleon_speech --task speech "a red apple" --output apple.wav
    python sample.py --checkpoint runs/chameleon_speech --transcribe apple.wav
    accelerate launch sample.py --checkpoint runs/coco --prompts-file coco-30k.txt --output samples/coco-30k

Pictures are written as PNG files. grid.png shows the first of them side by side, and metadata.jsonl makes the folder
an image folder for Hugging Face datasets and evaluate/clip_score.py. Another command with the same --output adds its
results to the folder; grid.png then shows the new ones. To resume an interrupted command, give it again. accelerate
shares the work over GPUs.

Every result has its own seed, which depends only on --seed, its prompt and its number among the results of that
prompt, not on other prompts, --batch-size or the number of GPUs. It is stored as image_seed:
TransfusionPipeline.from_pretrained(SNAPSHOT)(PROMPT, generator=torch.Generator().manual_seed(IMAGE_SEED)) paints the
picture again.
"""

from transfusion_mot.cli.options import parse_arguments
from transfusion_mot.errors import exit_on_user_error


def main() -> None:
    """Run the command line."""
    options = parse_arguments(__doc__ or "")
    # PyTorch takes seconds to load; --help and mistakes in the options end before it.
    from transfusion_mot.cli.sampling import run

    run(options)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
