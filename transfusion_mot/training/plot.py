"""The loss plot of a run."""

from pathlib import Path

from matplotlib.figure import Figure

from transfusion_mot.training.metrics import read_metrics

CURVES = (
    ("text loss (nats per token)", ("text_loss", "validation/text_loss", "validation/caption_loss")),
    ("diffusion loss (squared error per element)", ("diffusion_loss", "validation/diffusion_loss")),
)


def plot_losses(metrics_file: Path, output: Path) -> None:
    """Draw both losses, in training and on held-out documents, against steps."""
    lines = read_metrics(metrics_file)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2), CURVES, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                few = len(points) < 20
                axes.plot(*zip(*points, strict=True), marker="o" if few else None, label=name, linewidth=1.2)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(output, dpi=120)
