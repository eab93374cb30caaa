"""Open the page: python -m transfusion_mot.demo --checkpoint runs/emoji"""

from transfusion_mot.cli.options import DTYPES, OneLineParser, shipped_checkpoint
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.files import find_snapshot
from transfusion_mot.path_options import PathOption


def main() -> None:
    """Serve the page until it is interrupted."""
    parser = OneLineParser(
        prog="python -m transfusion_mot.demo", description="A page to try a trained model in the browser."
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        action=PathOption,
        check=find_snapshot,
        metavar="FOLDER",
        help="a run folder of train.py, or a snapshot (default: checkpoints/emoji)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address of the page; 0.0.0.0 makes it visible to other machines (default: 127.0.0.1)",
    )
    add("--port", type=int, default=7860, help="port of the page (default: 7860)")
    add("--share", action="store_true", help="open a public link through Gradio's servers")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add("--dtype", choices=DTYPES, help="number format of the transformer (default: bf16 on CUDA, else fp32)")
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint or shipped_checkpoint()
    # PyTorch takes seconds to load. --help and mistakes in the options do not wait for it.
    import torch

    from transfusion_mot.cli.loading import load_pipeline
    from transfusion_mot.demo.page import build_page, launch_options
    from transfusion_mot.demo.shared import MAX_QUEUE, gr

    if gr is None:
        raise UserError("the page needs gradio; install it with pip install 'transfusion-mot[demo]'")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    page = build_page(load_pipeline(checkpoint, device, arguments.dtype)).queue(max_size=MAX_QUEUE)
    try:
        page.launch(**launch_options(arguments.host, arguments.port, arguments.share))
    except OSError as error:
        raise UserError(f"port {arguments.port} of {arguments.host} cannot be used: {error}") from None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
