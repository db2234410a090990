"""A Hugging Face classifier of short texts: DistilBERT's blocks, small, and the mean of what they make.

It is built from a configuration, so nothing is downloaded. It takes tokens and nothing else: a mask of the
padding depends on the samples, and would have to cross the cut beside the activations. Without one, padding
is a token like any other, and the network learns to look past it.
"""

from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel

from examples.text.data import LENGTH, PADDING, WORDS, encoded


class TextClassifier(nn.Module):
    """(B, LENGTH) int64 -> logits (B, classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.example_input = encoded("an example")[None]  # its type and shape are those of the input
        config = DistilBertConfig(
            vocab_size=WORDS,
            max_position_embeddings=LENGTH,
            pad_token_id=PADDING,
            dim=64,
            hidden_dim=128,
            n_layers=2,
            n_heads=4,
        )
        self.blocks = DistilBertModel(config)
        self.classifier = nn.Linear(config.dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.blocks(input_ids=tokens).last_hidden_state  # (B, LENGTH, 64)
        logits: Tensor = self.classifier(h.mean(1))
        return logits


def build(num_classes: int) -> nn.Module:
    return TextClassifier(num_classes)
