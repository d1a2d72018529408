"""Convert: convert between Hugging Face folders, GGUF files and run folders.

    maxllm convert from-hf   SmolLM2-135M-Instruct  runs/smollm2  --verify
    maxllm convert from-gguf smollm2.Q4_1.gguf      runs/smollm2
    maxllm convert to-hf     runs/smollm2           out/smollm2   --verify

A converted run folder is where other stages start (`start.policy=runs/smollm2`), and what chat, generate and
export read. Weights keep their type; nothing is ever half-written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from maxllm import recipe
from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import RunFailed, UserError, listed
from maxllm.files import whole_folder
from maxllm.folder import RunFolder
from maxllm.hf import gguf, mapping
from maxllm.hf.export import DTYPE_OF, export
from maxllm.hf.folder import HfModel, open_model
from maxllm.hf.generation import not_followed, settings_of
from maxllm.hf.hub import download, upload
from maxllm.hf.load import load
from maxllm.hf.original import is_original
from maxllm.hf.source import DTYPES, open_folder
from maxllm.hf.tokenizer_read import Found, find_tokenizer, read_generation
from maxllm.hf.verify import TOLERANCE, check_tensors, compare_logits, has_torch, hf_logits
from maxllm.hf.verify_tokenizer import check_tokenization
from maxllm.model.llama import Llama
from maxllm.parallel import processes
from maxllm.parallel.mesh import make_mesh
from maxllm.records import Params
from maxllm.report.stage import StageReport
from maxllm.run.checkpoint import save_params
from maxllm.run.console import console
from maxllm.run.machine import peak_rss_bytes, trim_heap
from maxllm.run.parents import in_use
from maxllm.run.restore import load_params, open_array, stored_dtypes
from maxllm.run.session import Session, reopen
from maxllm.stages.convert_peft import adapters_beside, is_converted
from maxllm.stages.export import CHECK_PROMPTS, export_scorer
from maxllm.stages.registry import stage_of
from maxllm.stages.stage import Reply, Stage
from maxllm.stages.start import abstract_params, whole_params
from maxllm.steps.state import abstract, init_params

Direction = Literal["from-hf", "from-gguf", "from-peft", "to-hf"]

CHECK_TOKENS = 64
"""Length of the sequence that both implementations read."""

WRITTEN = ("tensors", "parameters", "bytes", "padding")
"""What is told of an export; the last where there is something to say of it."""


def run(
    direction: Direction,
    source: str,
    target: Path,
    *,
    verify: bool = False,
    allow_pickle: bool = False,
    hub: bool = False,
    dtype: str | None = None,
    push: str | None = None,
    base: RunFolder | None = None,
) -> dict[str, Any]:
    """Converts; where `push` names a repository of the hub, a Hugging Face folder goes there too.

    Returns:
      {"tensors", "parameters", "bytes", "seconds", "peak_rss_bytes"}; of adapters also {"adapters",
      "beside"}; of other models {"padding"} where nothing but a stop token pads, and into a run folder
      {"context", "tokenizer", "stop_tokens"} and, of a generation_config.json, {"kept_but_not_followed"};
      with `verify` {"identical_tensors", "tokenized_alike", "max_abs_logit_diff", "mean_kl",
      "top1_agreement"}. The logits' three are None where torch is missing, or for the reason in
      "not_checked".

    Raises:
      UserError: the source is not a model that ours can be, or the target holds something else.
      RunFailed: the two implementations do not agree; nothing is left at the target.
    """
    started = time.perf_counter()
    if push and direction != "to-hf":
        raise UserError("--push goes with to-hf: a run folder is not what the Hugging Face hub holds")
    if (base is not None) != (direction == "from-peft"):
        raise UserError(
            "from-peft needs --base RUN, the model that the adapters are for; nothing else has it"
        )
    processes.initialize()
    if base is not None:
        figures = adapters_beside(base, local(source), target)
    elif direction == "to-hf":
        figures = to_hf(RunFolder(source), target, verify, dtype)
        figures |= {"pushed": upload(target, push)} if push else {}
    else:
        folder = download(source) if hub else local(source)
        figures = to_run_folder(direction, folder, target, verify, allow_pickle)
    return figures | {"seconds": round(time.perf_counter() - started, 3), "peak_rss_bytes": peak_rss_bytes()}


def local(source: str) -> Path:
    """A path on this machine.

    Raises:
      UserError: it is not there; a name that may be a hub id is told how to fetch it.
    """
    path = Path(source)
    if not path.exists():
        looks_like_id = source.count("/") == 1 and not source.startswith(("/", "."))
        hint = "; to download a model of that name from the Hugging Face hub, add --hub" * looks_like_id
        raise UserError(f"{source} does not exist{hint}")
    return path


# --- to a run folder ---------------------------------------------------------------------------------------


def to_run_folder(
    direction: Direction, source: Path, target: Path, verify: bool, allow_pickle: bool
) -> dict[str, Any]:
    """from-hf and from-gguf."""
    if direction == "from-gguf":
        model = gguf.open_gguf(source)
        gguf_tokenizer = gguf.tokenizer_of(source)
        found = Found(gguf_tokenizer, source.name, {source.name: list(gguf_tokenizer.stop_tokens)})
        generation = None
    else:
        model = open_model(source, allow_pickle)
        found = find_tokenizer(source, model.fields)
        generation = read_generation(source)
    tokenizer = found.tokenizer
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}"
        )
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    wanted = typed(abstract(partial(init_params, Llama(model.config.computed_in("float32"))), mesh), model)
    users = in_use(RunFolder(target))
    if users:
        names = ", ".join(name for runs in users.values() for name in runs)
        line = f"convert: replaces {target}, from which {names} began: they go on if its weights are the same"
        console().print(line, markup=False, soft_wrap=True)
    with whole_folder(target, is_converted) as folder:
        with bar("reading", model.source.nbytes) as tick:
            params = load(model.source, model.config, wanted, tick)
        trim_heap()  # of what the readers freed, before the writer asks for more
        made = RunFolder(folder)
        save_params(made, params)
        write_run_files(made, target, model, tokenizer, generation)
        made.copy_dependents(RunFolder(target))
        del params
        checks = check_run_folder(direction, source, model, tokenizer, folder, wanted) if verify else {}
    ignored = not_followed(generation)
    return {
        "tensors": len(model.source.tensors),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(wanted)),
        "bytes": model.source.nbytes,
        "context": model.config.context,
        **found.report(),
        **({"kept_but_not_followed": listed(ignored)} if ignored else {}),
        **checks,
    }


def typed(wanted: Params, model: HfModel) -> Params:
    """The abstract parameters in the types that the source has, so that nothing is rounded or inflated."""
    flat = flatten_dict(wanted, sep="/")
    for row in mapping.rows(model.config):
        names = [name for name in mapping.hf_names(row, model.config) if name in model.source.tensors]
        kinds = {model.source.tensors[name].dtype for name in names}
        dtype = jnp.result_type(*kinds) if kinds else jnp.float32
        flat[row.path] = flat[row.path].update(dtype=dtype)
    return mapping.nest(flat.items())


def write_run_files(
    folder: RunFolder, target: Path, model: HfModel, tokenizer: Tokenizer, generation: dict[str, Any] | None
) -> None:
    """What a run folder has besides its checkpoint."""
    length = model.config.context
    tree = {
        "stage": "convert",
        "run": {"dir": str(target), "steps": 1},
        "model": model.config.model_dump(mode="json"),
        "batch": {"rows": 1, "sequence_length": max(2, length)},
        "generation": settings_of(generation, length),
    }
    folder.write_tokenizer(tokenizer.files)
    folder.write_hf(model.fields, generation)
    folder.write_config(recipe.dump(recipe.validate(tree)))


# --- to a Hugging Face folder ------------------------------------------------------------------------------


def to_hf(run: RunFolder, target: Path, verify: bool, dtype: str | None) -> dict[str, Any]:
    """A run's newest model as a Hugging Face folder, in the type it came in (trained ones: float32)."""
    session = reopen(run)
    if stage_of(session.config.stage).replies(session) == "score":
        written = export_scorer(session, run.find(), target, CHECK_PROMPTS, verify, dtype=dtype or "float32")
        # The one logit of a classifier with one label is its score.
        logits = {
            "max_abs_logit_diff": written["max_abs_score_diff"],
            "mean_kl": None,
            "top1_agreement": None,
        }
        return told(written) | (logits if verify else {})
    checkpoint = run.find()
    if session.config.tuning is not None:
        params = whole_params(session, checkpoint)

        def read(path: str, leaf: Any) -> Any:
            return leaf

        whole: Callable[[], Params] = partial(whole_params, session, checkpoint)
    else:
        params = stored_dtypes(checkpoint, abstract_params(session, Llama(session.model)))

        def read(path: str, leaf: Any) -> Any:
            trim_heap()
            return open_array(checkpoint, path)  # when its turn comes

        whole = partial(load_params, checkpoint, params)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    kept = kinds.pop() if len(kinds) == 1 else "float32"
    checks: dict[str, Any] = {}

    def compare(folder: Path) -> None:
        if verify:
            rounded = dtype if dtype is not None and dtype != kept else "float32"
            checks["tokenized_alike"] = check_tokenization(session.tokenizer, folder)
            checks.update(check_hf_folder(session.model, whole(), folder, dtype or kept, rounded))

    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    with bar("writing", size) as tick:
        written = export(
            params,
            session.model,
            session.tokenizer,
            target,
            dtype=dtype or kept,
            description=f"Converted from a run of `maxllm {session.config.stage}`.",
            base=session.hf_config,
            base_generation=session.hf_generation,
            tick=tick,
            read=read,
            verify=compare,
        )
    return told(written) | checks


def told(written: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an export that a conversion tells."""
    return {name: written[name] for name in WRITTEN if name in written}


# --- verification ------------------------------------------------------------------------------------------


def check_run_folder(
    direction: Direction, source: Path, model: HfModel, tokenizer: Tokenizer, folder: Path, wanted: Params
) -> dict[str, Any]:
    """The finished checkpoint, read back: the tensors of the source, the ids and logits of `transformers`."""
    params = load_params(RunFolder(folder).find(), wanted)
    checks: dict[str, Any] = {"identical_tensors": check_tensors(model.source, params, model.config)}
    foreign = unread_by_transformers(direction, source)
    theirs: Callable[[np.ndarray], np.ndarray] | None = None
    if foreign is not None:
        checks["not_checked"] = f"ids and logits, because {foreign}"
    elif direction == "from-gguf":
        checks["tokenized_alike"] = check_tokenization(
            tokenizer, source.parent, source.name, gguf.cut_otherwise_by_transformers(source)
        )
        theirs = partial(hf_logits, source.parent, gguf=source.name)
    else:
        checks["tokenized_alike"] = check_tokenization(tokenizer, source)
        theirs = partial(hf_logits, source)
    return checks | difference_of(model.config, params, theirs if has_torch() else None, "float32")


def unread_by_transformers(direction: Direction, source: Path) -> str | None:
    """Why `transformers` cannot be asked about a source; None where it can."""
    if direction == "from-gguf":
        if not has_torch():
            return "transformers reads no GGUF without torch"
        return "transformers reads no GGUF in parts" if len(gguf.parts_of(source)) > 1 else None
    return "transformers does not read this layout" if is_original(source) else None


def check_hf_folder(
    config: ModelConfig, params: Params, folder: Path, dtype: str, rounded_to: str
) -> dict[str, Any]:
    """The finished folder, read back: its tensors are ours in its type, its logits ours in `transformers`."""
    identical = check_tensors(open_folder(folder), params, config, np.dtype(DTYPES[DTYPE_OF[dtype]]))
    theirs = partial(hf_logits, folder) if has_torch() else None
    return {"identical_tensors": identical, **difference_of(config, params, theirs, rounded_to)}


def difference_of(
    config: ModelConfig,
    params: Params,
    theirs: Callable[[np.ndarray], np.ndarray] | None,
    rounded_to: str,
) -> dict[str, Any]:
    """Both implementations on the same tokens; None for each figure where torch is missing.

    Raises:
      RunFailed: the logits differ by more than rounding explains.
    """
    if theirs is None:
        return {"max_abs_logit_diff": None, "mean_kl": None, "top1_agreement": None}
    length = min(CHECK_TOKENS, config.context)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    figures = compare_logits(our_logits(config, params, tokens_BT), theirs(tokens_BT))
    if not figures["max_abs_logit_diff"] <= TOLERANCE[rounded_to]:
        raise RunFailed(
            f"the converted model does not say what transformers says: logits differ by up to "
            f"{figures['max_abs_logit_diff']:.3g} ({TOLERANCE[rounded_to]:g} allowed), "
            f"mean KL {figures['mean_kl']:.3g} nats"
        )
    return figures


def our_logits(config: ModelConfig, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of our model in float32."""
    model = Llama(config.model_copy(update={"dtype": "float32"}))
    inputs = [jnp.asarray(a, jnp.int32) for a in (tokens_BT, np.ones_like(tokens_BT))]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def logits(params: Params) -> Any:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return model.apply({"params": wide}, *inputs, positions_BT)

    return np.asarray(jax.jit(logits)(params))


@contextmanager
def bar(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, on a terminal."""
    terminal = console(processes.is_main())
    columns = (TextColumn(f"convert: {what}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task(what, total=size)
        yield lambda done: progress.advance(task, done)


# --- as the stage that a converted folder names -----------------------------------------------------------


def trains_nothing(*arguments: object) -> NoReturn:
    """Stands where a stage has its program, its job and its held-out figures.

    Raises:
      UserError: always.
    """
    raise UserError(
        "a converted model's folder trains nothing and has no held-out figures; give a recipe or a run "
        "that starts from it"
    )


def replies(session: Session) -> Reply:
    """Answers in turns where the model came with a chat template; goes on with the text elsewhere."""
    return "text" if session.tokenizer.chat_template is None else "turns"


STAGE = Stage(
    program=trains_nothing,
    job=trains_nothing,
    replies=replies,
    report=StageReport(title="Converted model"),
)
