"""LoRA: the layers and what one does with them (`layers`), and every kind of file (`files`)."""

from .files import load_lora, load_lora_to_train, save_lora, split_lora
from .layers import (
    ATTENTION_LINEARS,
    base_state_dict,
    inject_lora,
    lora_by_tensor,
    lora_disabled,
    lora_layers,
    merge_lora,
    set_lora_weight,
    unmerge_lora,
)

__all__ = [
    "ATTENTION_LINEARS", "base_state_dict", "inject_lora", "load_lora", "load_lora_to_train", "lora_by_tensor",
    "lora_disabled", "lora_layers", "merge_lora", "save_lora", "set_lora_weight", "split_lora", "unmerge_lora",
]
