"""Llama-shaped checkpoints in several shards, as folders of transformers, for tests of general symmetries."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers

import permgraph as pg

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def llama_pair(root: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """Folders ``a`` and ``b``, each in four shards or more, and their spec in ``spec.json``.

    A's weights are random. B is A with noise of half their size, and then somewhere else in the whole group.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes}))
        spec = pg.auto_spec(model, symmetry="general")
        spec.save(root / "spec.json")
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for weight in parameters.values():
                weight.add_(0.1 * torch.randn_like(weight))
            _save(model, root / "a", dtype)
            for weight in parameters.values():
                weight.add_(0.5 * weight.std() * torch.randn_like(weight))
            model.load_state_dict(spec.random(1, every_group=True).apply(model.state_dict()))
            _save(model, root / "b", dtype)
    return root


def _save(model: transformers.PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    copy = deepcopy(model).to(dtype)
    copy.save_pretrained(folder, max_shard_size=sum(weight.nbytes for weight in copy.parameters()) // 4)
