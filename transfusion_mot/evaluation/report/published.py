"""Numbers of papers for the table beside one's own; each belongs to the protocol of its paper.

Transfusion is arXiv 2408.11039, Mixture-of-Transformers is 2411.04996; models have seen 0.5T tokens unless said.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transfusion_mot.evaluation.report.content import Metric, shown_number


@dataclass(frozen=True)
class Row:
    """A row of the table; unknown values are empty.

    Attributes:
        model: Size and kind.
        protocol: Guidance and number of images.
        fid, clip, cider: As in the papers: CLIP score and CIDEr times 100.
        perplexity: Perplexity on C4 / Wikipedia, with the tokenizer of Llama 2.
        source: Table of the paper.
    """

    model: str
    protocol: str
    fid: str = ""
    clip: str = ""
    cider: str = ""
    perplexity: str = ""
    source: str = ""


PUBLISHED = (
    Row("0.16B dense, linear", "guidance 3, 5k", "37.6", "20.0", "6.2", "14.8 / 8.8", "Transfusion, table 7"),
    Row("0.16B dense, U-Net", "guidance 3, 5k", "18.8", "23.9", "15.3", "14.4 / 8.5", "Transfusion, table 7"),
    Row("163M dense, U-Net", "guidance 1, 30k", "27.4", "18.5", "14.2", "14.4 / 8.5", "MoT, figure 12"),
    Row("163M MoT, U-Net", "guidance 1, 30k", "21.6", "19.5", "23.2", "14.4 / 8.5", "MoT, figure 12"),
    Row("0.37B dense, linear", "guidance 3, 5k", "21.5", "22.4", "11.1", "12.0 / ", "Transfusion, table 7"),
    Row("0.37B dense, U-Net", "guidance 3, 5k", "18.1", "24.9", "21.1", "11.8 / ", "Transfusion, table 7"),
    Row("0.76B dense, linear", "guidance 3, 5k", "20.3", "24.0", "16.0", "10.4 / ", "Transfusion, table 7"),
    Row(
        "0.76B dense, U-Net",
        "guidance 3, 5k",
        "16.7",
        "25.4",
        "25.4 (29.4 with limited noise)",
        "10.3 / ",
        "Transfusion, tables 7 and 8",
    ),
    Row("760M dense, U-Net", "guidance 1, 30k", "25.6", "19.6", "25.1", "10.3 / ", "MoT, figure 12"),
    Row("760M MoT, U-Net", "guidance 1, 30k", "15.7", "21.4", "32.0", "10.2 / ", "MoT, figure 12"),
    Row("1.4B dense, U-Net", "guidance 1, 30k", "19.3", "20.6", "28.6", "about 9.4 / ", "MoT, figure 12"),
    Row("1.4B MoT, U-Net", "guidance 1, 30k", "15.9", "21.7", "33.5", "about 9.4 / ", "MoT, figure 12"),
    Row(
        "7B dense, U-Net",
        "guidance 1, 30k",
        "14.4",
        "22.1",
        "32.0",
        "7.8 / 4.3",
        "LMFusion, table 1; Transfusion, table 7",
    ),
    Row("7B dense, U-Net", "guidance 1.55, 30k", "8.70", "24.4", "32.0", "7.8 / 4.3", "Transfusion, table 7"),
    Row("7B MoT, U-Net", "guidance 1, 30k", "", "22.7", "40.6", "", "MoT, section 3.4.2"),
    Row("7B MoT, U-Net", "guidance 1.6, 30k", "8.14", "", "40.6", "", "MoT, section 3.4.2"),
    Row("7B dense, U-Net, 2T tokens", "guidance tuned, 30k", "6.78", "", "", "", "Transfusion, table 9; GenEval 0.63"),
)

CAVEAT = (
    "Published rows are zero-shot MS-COCO at 256 pixels, captions of the Karpathy test split, perplexity with the "
    "tokenizer of Llama 2. The papers do not name the implementation of FID, its reference images or the CLIP model. "
    "A footnote says that Transfusion's rows of guidance 3 have 5,000 images. Do not compare them with numbers of "
    "another protocol, number of images or network."
)


def own_row(model: str, protocol: str, metrics: Sequence[Metric]) -> Row:
    """The row of a model from its metrics; the cell of a distance that is not FID says so."""
    generated = {metric.name.removesuffix(" (generated)"): metric for metric in metrics}

    def of(*beginnings: str) -> tuple[str, str]:
        found = next((name for name in generated if name.startswith(beginnings)), None)
        return ("", "") if found is None else (found, shown_number(generated[found].value))

    name, distance = of("FID")
    if not distance:
        name, distance = of("FD-")
        distance = f"{distance} ({name}, no FID)" if distance else ""
    return Row(f"**{model}**", protocol, distance, of("CLIP score x100")[1], of("CIDEr x100")[1], "", "this evaluation")


HEADINGS = ("model", "protocol", "FID", "CLIP x100", "CIDEr x100", "PPL C4 / Wikipedia", "source")


def cells(row: Row) -> tuple[str, ...]:
    """A row in the order of `HEADINGS`."""
    return (row.model, row.protocol, row.fid, row.clip, row.cider, row.perplexity.removesuffix(" / "), row.source)


def published_table(own: Row) -> str:
    """A markdown table with one's own row first."""
    lines = [f"| {' | '.join(HEADINGS)} |", "| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    lines += [f"| {' | '.join(cells(row))} |" for row in (own, *PUBLISHED)]
    return "\n".join(lines)
