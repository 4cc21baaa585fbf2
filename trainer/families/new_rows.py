"""Rows of a text encoder's embedding beyond those that its model has, trained beside the table.

PEFT's trainable tokens put them into the table as a text is encoded. The table itself only grows: what it had
stays, and without a run's rows in use the encoder computes as ever.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import TrainableTokensConfig
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

_WRAPPED = "token_embedding.base_layer."


def add_rows(encoder: nn.Module, name: str, ids: Sequence[int], eos_token_id: int) -> Any:
    """Give a CLIP text encoder rows for new tokens, zeros as yet, active, and return PEFT's layer.

    Args:
        name: Tells the runs apart that share the encoder: rows of several may have the same ids.
        eos_token_id: Where the pooled vector is taken. Old configurations say 2, which is read as the largest
            id of a text: a new token.
    """
    wanted: Any = encoder
    layer: Any = wanted.get_input_embeddings()
    if not isinstance(layer, TrainableTokensLayer):
        layer = TrainableTokensLayer(layer, name)
        _put(encoder, layer)
    table = layer.get_base_layer()
    if (missing := max(ids) + 1 - len(table.weight)) > 0:
        zeros = table.weight.data.new_zeros(missing, table.embedding_dim)
        table.weight.data = torch.cat([table.weight.data, zeros])
        table.num_embeddings = len(table.weight)
    layer.update_layer(name, TrainableTokensConfig(token_indices=list(ids)))
    layer.set_adapter([name])
    layer.enable_adapters(True)
    read_pooled_at(encoder, eos_token_id)
    return layer


def read_pooled_at(encoder: nn.Module, eos_token_id: int) -> None:
    """Let a CLIP text encoder take its pooled vector at the first token of this id."""
    wanted: Any = encoder
    wanted.config.eos_token_id = eos_token_id
    # transformers of 5.6 and later have no wrapper around it
    getattr(wanted, "text_model", wanted).eos_token_id = eos_token_id


def table_of(encoder: nn.Module) -> Tensor:
    """Return the embedding of a text encoder as its model has it, without new rows."""
    wanted: Any = encoder
    layer = wanted.get_input_embeddings()
    table = layer.get_base_layer() if isinstance(layer, TrainableTokensLayer) else layer
    return cast(Tensor, table.weight.data[: wanted.config.vocab_size])


def without_new_rows(encoder: nn.Module) -> dict[str, Tensor]:
    """Return an encoder's tensors as if no run had ever added a row."""
    found = {}
    for name, tensor in encoder.state_dict().items():
        if ".trainable_tokens_" in name:
            continue
        if _WRAPPED in name:
            name, tensor = name.replace(_WRAPPED, "token_embedding."), table_of(encoder)
        found[name] = tensor
    return found


def _put(encoder: nn.Module, layer: TrainableTokensLayer) -> None:
    table = layer.get_base_layer()
    for module in encoder.modules():
        for own, child in module.named_children():
            if child is table and module is not layer:
                setattr(module, own, layer)
                return
    raise ValueError(f"{type(encoder).__name__} has no embedding of tokens")
