"""A contender for the training-step benchmark: the package transfusion-pytorch 0.20.0 at its fastest.

    pip install transfusion-pytorch==0.20.0

It has no towers: all tokens share their weights. Instead each layer modulates every token by its timestep, before and
after attention and feed-forward; these products have two thirds of its parameters. Each layer also attends to the
results of all earlier layers. Neither can be switched off. So at equal width, depth and feed-forward it has three times
the parameters for each token, which matters in comparisons.

Options that cost time are off: gates on the values, soft-capped scores, axial positions of patches, and prompt dropout
inside the step. Its norm of queries and keys is off, too: under autocast its result is float32 beside bfloat16 values,
which FlexAttention only accepts in newer versions of torch. Its U-Net skips stay on, because its forward fails without
them (version 0.20.0).

FlexAttention (on CUDA; elsewhere its own dense attention), bfloat16 autocast and fused AdamW are on. Both halves of
each layer and the attention to earlier layers are compiled. The rest is Python over lists of documents.

A row is one document, because the package's mask cannot separate documents of a row. Its tokens for begin, end and size
count as text, like ours: a row of 256 text slots and 256 patches has 512 slots, four whole blocks of FlexAttention. The
vocabulary includes them, too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW
from transfusion_pytorch import Transfusion

# Begin and end of the document; for an image its marker, the three characters of "256", begin and end.
MARKS = 8
# Ids of those tokens and of 128 characters.
EXTRA_IDS = 134


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a document.

    Attributes:
        hidden_size, num_layers, num_heads, head_dim, intermediate_size, vocab_size: As in `ModelConfig`; the
            feed-forward has a gate, like ours.
        text_slots: Text slots of a document, including special tokens.
        patches: Patches of its image, a number of three digits.
        patch_elements: Values of a patch.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    text_slots: int = 256
    patches: int = 256
    patch_elements: int = 32


class TransfusionPytorch:
    """Its model, optimizer and data, for whole training steps.

    Args:
        shape: Sizes.
        device: Device of training.
        rows: Documents of a step; see `biggest_batch`.
    """

    def __init__(self, shape: Shape, device: torch.device, rows: int = 1) -> None:
        on_gpu = device.type == "cuda"
        self.shape = shape
        self.device = device
        self.rows = rows
        self.num_text_tokens = shape.vocab_size - EXTRA_IDS
        self.model = Transfusion(
            num_text_tokens=self.num_text_tokens,
            dim_latent=shape.patch_elements,
            modality_default_shape=(shape.patches,),
            prob_uncond=0.0,
            transformer={
                "dim": shape.hidden_size,
                "depth": shape.num_layers,
                "dim_head": shape.head_dim,
                "heads": shape.num_heads,
                # The package uses two thirds of this width, because of the gate.
                "ff_expansion_factor": 1.5 * shape.intermediate_size / shape.hidden_size,
                "qk_rmsnorm": False,
                "use_flex_attn": on_gpu,
                # Its dense attention divides by the cap even if it is 0.
                "attn_kwargs": {"gate_values": False, "softcap_value": 0.0 if on_gpu else 50.0},
            },
        ).to(device)
        self.optimizer = AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @property
    def tokens_per_step(self) -> int:
        """Slots of a step, text and patches."""
        return self.rows * (self.shape.text_slots + self.shape.patches)

    def documents(self) -> list[list[Tensor]]:
        """Freshly drawn documents in the package's form: text, then patches [P, elements]."""
        shape = self.shape
        length = shape.text_slots - MARKS + 1
        text = torch.randint(self.num_text_tokens, (self.rows, length), device=self.device)
        patches = torch.randn(self.rows, shape.patches, shape.patch_elements, device=self.device)
        return [list(pair) for pair in zip(text.unbind(), patches.unbind(), strict=True)]

    def step(self, documents: list[list[Tensor]] | None = None) -> Tensor:
        """Forward, backward, clip and update on fresh documents, or on those given => the loss, on the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(documents or self.documents())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def compile(self) -> None:
        """Compile the three parts of each layer; the attention to earlier layers once for each number of them."""
        # All parts count as one function. The limit allows three batch sizes.
        torch._dynamo.config.recompile_limit = 3 * (self.shape.num_layers + 4)
        for _, attention, feed_forward, earlier in self.model.transformer.layers:
            for module in (attention, feed_forward, earlier):
                module.compile(dynamic=False)

    def biggest_batch(self, limit: int) -> int:
        """Double `rows` until a step runs out of memory or `limit` is passed; keep and return the last one that fits.

        If the first number does not fit, halve it. Every size is compiled again.
        """
        while not self._fits():
            self.rows //= 2
            limit = self.rows
        while 2 * self.rows <= limit:
            self.rows *= 2
            if not self._fits():
                self.rows //= 2
                break
        return self.rows

    def _fits(self) -> bool:
        """Whether two steps fit in memory; the first makes the optimizer's state."""
        try:
            self.step()
            self.step()
            return True
        except torch.OutOfMemoryError:
            if self.rows == 1:
                raise
        # Outside the handler, which keeps the activations alive.
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return False
