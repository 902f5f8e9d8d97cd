"""Every hidden state, query, key and value of real models against transformers in PyTorch, padded on either side.

    python benchmarks/parity_on_real_weights.py FOLDER [FOLDER ...]

Prints, for each folder and padding side, the largest relative error (largest difference over the largest value of the tensor)
in float32 over real tokens; beside it that of PyTorch in float32 against PyTorch in float64, which is what float32 allows; and
whether export and reload in PyTorch give back every weight bit for bit. The suite does the same on tiny models.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from jaxdistill.models import encode, load_pretrained, save_pretrained

LENGTH, ROWS = 96, 6


def rows(config, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens; row b has b * 13 slots of padding."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(5, config.vocab_size, (ROWS, LENGTH)), np.ones((ROWS, LENGTH), np.int32)
    for row in range(1, ROWS):
        padding = slice(LENGTH - 13 * row, LENGTH) if side == "right" else slice(0, 13 * row)
        ids[row, padding], mask[row, padding] = config.pad_token_id, 0
    return ids.astype(np.int32), mask


def reference(model, ids: np.ndarray, mask: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    found: dict[tuple[str, int], np.ndarray] = {}
    hooks = []
    for number, block in enumerate(model.encoder.layer, 1):
        for kind in ("query", "key", "value"):
            projection = getattr(block.attention.self, kind)
            hooks.append(projection.register_forward_hook(lambda _, __, out, at=(kind, number): found.__setitem__(at, out.numpy())))
    with torch.no_grad():
        output = model(torch.tensor(ids), torch.tensor(mask), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return found | {("hidden", number): state.numpy() for number, state in enumerate(output.hidden_states)}


def largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def main(folders: list[str]) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    for folder in folders:
        config, params = load_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer="pooler" in params).eval()
        for side in ("right", "left"):
            ids, mask = rows(config, side)
            output = encode(config, params, ids, mask)
            single, double = reference(model.float(), ids, mask), reference(model.double(), ids, mask)
            ours = {at: np.asarray(getattr(output, at[0])[at[1]]) for at in single}
            for slots, name in ((mask == 1, "real tokens"), (mask == 0, "padding")):
                errors = {at: largest(ours[at][slots], single[at][slots]) for at in single}
                allowed = max(largest(single[at][slots], double[at][slots]) for at in single)
                worst = max(errors, key=errors.get)
                where = f"{errors[worst]:.1e} ({worst[0]} of layer {worst[1]})"
                print(f"{Path(folder).name}  padded {side}, {name}: {len(errors)} tensors, worst {where}; PyTorch itself {allowed:.1e}")
        model.float()
        with tempfile.TemporaryDirectory() as copy:
            save_pretrained(Path(copy), config, params)
            again, info = transformers.AutoModel.from_pretrained(
                copy, dtype=torch.float32, add_pooling_layer="pooler" in params, output_loading_info=True
            )
        equal = all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        print(f"{Path(folder).name}  export and reload: bit-equal {equal}, {({name: sorted(keys) for name, keys in info.items() if keys})}")


if __name__ == "__main__":
    main(sys.argv[1:])
