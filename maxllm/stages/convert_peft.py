"""Convert from PEFT: a folder of adapters as a run folder beside the model that they were trained on.

maxllm convert from-peft out/adapter runs/adapted --base runs/smol
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from maxllm import recipe
from maxllm.config.tuning import Tuning
from maxllm.errors import UserError
from maxllm.files import whole_folder
from maxllm.folder import RunFolder
from maxllm.hf.peft import read_adapters
from maxllm.run.checkpoint import save_params
from maxllm.run.parents import entry_of, mark_in_use
from maxllm.run.restore import stored_tree


def adapters_beside(base: RunFolder, source: Path, target: Path) -> dict[str, Any]:
    """Writes a run folder that holds the adapters, and says what they lie beside.

    Args:
      base: the run whose newest model the adapters adapt: of a conversion of the model that PEFT's folder
        names, or of what was exported for PEFT.
      source: PEFT's folder.
      target: absent, or a former conversion.

    Returns:
      {"adapters": what they are, "tensors", "parameters", "bytes", "beside": the base's folder and step}.

    Raises:
      UserError: the adapters are not such as ours can be, or do not fit the model; nothing is written then.
    """
    begun = recipe.of_run(base)
    if begun.model is None or begun.stage == "reward":
        raise UserError(f"{base} holds no language model")
    if begun.tuning is not None and begun.tuning.beside is not None:
        raise UserError(f"{base} trained {begun.tuning.beside.named()}, beside which there can be no others")
    tuning, adapters = read_adapters(source, begun.model)
    checkpoint = base.find()
    stored_tree(checkpoint)  # it is there, and whole
    with whole_folder(target, is_converted) as folder:
        made = RunFolder(folder)
        save_params(made, jax.tree.map(jax.numpy.asarray, adapters))
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            if (base.path / name).is_file():
                made.write_tokenizer({name: (base.path / name).read_bytes()})
        made.write_hf(*base.read_hf())
        made.write_parents({"policy": entry_of(checkpoint, made)})
        made.write_config(recipe.dump(recipe.validate(recipe_of(begun, tuning, base, target))))
    mark_in_use(checkpoint, RunFolder(target), print)
    leaves = jax.tree.leaves(adapters)
    return {
        "adapters": tuning.named(),
        "tensors": len(leaves),
        "parameters": sum(leaf.size for leaf in leaves),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "beside": f"{base.shown()}, step {checkpoint.name}",
    }


def is_converted(folder: Path) -> bool:
    """Whether a folder is a former conversion, which may be replaced; a training run may not."""
    return "stage: convert" in (RunFolder(folder).config_text() or "")


def recipe_of(begun: Any, tuning: Tuning, base: RunFolder, target: Path) -> dict[str, Any]:
    """What config.yaml says: a conversion that begins from the base."""
    tree = {
        "stage": "convert",
        "run": {"dir": str(target), "steps": 1},
        "start": {"policy": str(base.path)},
        "model": begun.model.model_dump(mode="json"),
        "batch": {"rows": 1, "sequence_length": begun.batch.sequence_length},
        "generation": begun.generation.model_dump(mode="json"),
    }
    sections = {name: section for name, section in vars(tuning).items() if section is not None}
    return tree | {name: section.model_dump(mode="json") for name, section in sections.items()}
