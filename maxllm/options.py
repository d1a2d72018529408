"""The words of the command line: one subparser per verb. What a verb does is in verbs.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import maxllm
from maxllm.config.stages import TRAINED
from maxllm.stages.registry import described
from maxllm.words import checkpoint, local_path, named_run, positive, run_folder, share, times

EPILOG = """\
A recipe is a YAML file, or the name of one under configs/ (pretrain/tiny_slice_cpu). Any of its fields can be
overridden by words after it: optimizer.learning_rate=3e-4 run.dir=runs/mine. --print-config shows the result.

the whole road in one command:
  maxllm quickstart
stage by stage:
  maxllm prepare  pretrain/tiny_slice_cpu
  maxllm pretrain pretrain/tiny_slice_cpu
  maxllm data show sft/tiny_tasks_cpu         what is trained on, token by token
  maxllm sft      sft/tiny_tasks_cpu
  maxllm reward   reward/tiny_tasks_cpu
  maxllm ppo      ppo/tiny_tasks_cpu
  maxllm dpo      dpo/tiny_tasks_cpu          instead of reward and ppo
  maxllm chat     runs/tiny/ppo
  maxllm export   runs/tiny/ppo runs/tiny/hf

Interrupt a run (Ctrl-C, SIGTERM, even kill -9) and give the same command again: it continues.
"""

INSTRUCTIONS = {
    "instructions": "write prompts by kind of task, in English and Chinese, for a teacher to answer",
    "thoughts": "write rows of SFT that think a sum through, and end with its right answer",
    "negatives": "write rows of SFT that refuse, or ask back when too little was said",
}
"""Kinds of rows that are here, and what `data` says of them."""

RECIPE_VERBS = ("prepare", *TRAINED)
"""Verbs that take a recipe, and go on where they were interrupted."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed words. Overrides may stand anywhere, also after options, where argparse alone loses them."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if options.verb == "generate":
        check_generate(parser, options)
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser with one subparser per verb."""
    parser = argparse.ArgumentParser(
        prog="maxllm",
        description="The whole life of a LLaMA model in JAX: text, tokenizer, pretraining, SFT, "
        "reward model, PPO, Hugging Face.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maxllm {maxllm.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_quickstart(verbs)
    for verb in RECIPE_VERBS:
        add_trainer(verbs, verb, described(verb))
    add_data(verbs)
    add_plan(verbs)
    add_convert(verbs)
    add_readers(verbs)
    add_launching(verbs)
    add_json(add_verb(verbs, "doctor", "show what is here (devices, job, disk), and what would fail"))
    return parser


def add_verb(verbs: Any, name: str, description: str) -> Any:
    """A subparser with what all verbs have."""
    verb = verbs.add_parser(
        name, help=description, description=description[0].upper() + description[1:] + "."
    )
    verb.add_argument("--debug", action="store_true", help="show the traceback behind an error")
    return verb


def add_overrides(verb: Any, example: str) -> None:
    """The trailing key=value words."""
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=f"override a field, as in {example}")


def add_json(verb: Any) -> None:
    """--json for verbs that inspect."""
    verb.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_push(verb: Any) -> None:
    """--push for verbs that write Hugging Face folders."""
    verb.add_argument("--push", metavar="OWNER/NAME", help="put the folder on the Hugging Face hub, private")


def add_checkpoint(verb: Any) -> None:
    """--checkpoint for verbs that read a run folder."""
    verb.add_argument(
        "--checkpoint",
        type=checkpoint,
        default="latest",
        metavar="WHICH",
        help="best, latest (the default) or the number of a step",
    )


def add_quickstart(verbs: Any) -> None:
    """quickstart."""
    verb = add_verb(
        verbs,
        "quickstart",
        "take the whole road, from text to a Hugging Face folder and a report",
    )
    verb.add_argument(
        "--out", type=local_path, default=Path("runs/quickstart"), help="folder (default %(default)s)"
    )
    verb.add_argument("--fast", action="store_true", help="the same road in under two minutes, for tests")
    add_json(verb)


def add_trainer(verbs: Any, name: str, description: str) -> None:
    """A verb that takes a recipe."""
    verb = add_verb(verbs, name, description)
    verb.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of one under configs/")
    add_overrides(verb, "run.steps=100")
    verb.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    if name in TRAINED:
        verb.add_argument(
            "--restarts",
            type=times,
            default=0,
            metavar="N",
            help="begin again after a hang, a lost process or a kill, up to N times in a row",
        )
    add_json(verb)


def add_plan(verbs: Any) -> None:
    """plan."""
    verb = add_verb(
        verbs, "plan", "compile a recipe for a machine that is not here: memory, collectives, time, cost"
    )
    verb.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of one under configs/")
    add_overrides(verb, "mesh.fsdp=16")
    add_hardware(verb)
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--estimate", action="store_true", help="arithmetic instead of the compiler: at once")
    how.add_argument(
        "--search", action="store_true", help="try meshes, remat and rows; compile the best to confirm"
    )
    how.add_argument(
        "--layout", action="store_true", help="how every parameter is split over the devices, and stop"
    )
    verb.add_argument("--tokens", type=float, metavar="COUNT", help="length of the training, as in 2e12")
    verb.add_argument("--price", type=float, metavar="AMOUNT", help="of a chip for an hour, any currency")
    add_json(verb)


def add_data(verbs: Any) -> None:
    """data."""
    kinds = add_verb(verbs, "data", "show rows as they are trained on, or write instructions to begin with")
    kinds = kinds.add_subparsers(dest="what", required=True, metavar="WHAT")
    verb = add_verb(kinds, "show", "show a recipe's rows: tokens, documents, what is in the loss")
    verb.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of one under configs/")
    add_overrides(verb, "'data.sources=[\"mine.jsonl\"]'")
    verb.add_argument("--rows", type=positive, default=4, metavar="N", help="so many (default %(default)s)")
    add_json(verb)
    for name, description in INSTRUCTIONS.items():
        verb = add_verb(kinds, name, description)
        verb.add_argument("--out", type=local_path, required=True, metavar="FILE.jsonl", help="file to write")
        verb.add_argument("--count", type=positive, default=200, metavar="N", help="(default %(default)s)")
        verb.add_argument("--seed", type=times, default=0, metavar="N", help="(default %(default)s)")
        verb.add_argument("--task", action="append", metavar="NAME", help="only this kind; may be repeated")
        add_json(verb)


def add_hardware(verb: Any) -> None:
    """--hardware of verbs that know machines."""
    verb.add_argument(
        "--hardware",
        metavar="NAME",
        help="v5e-256, v6e-16 (chips), v5p-16 (cores), v5p:2x2x2, tpu7x:4x4x4 (shape), 2xv5p-16 (slices), "
        "h100x8, h200x16; default: run.hardware of the recipe",
    )


def add_launching(verbs: Any) -> None:
    """machine and manifest, which the scripts in launch/ ask."""
    verb = add_verb(verbs, "machine", "show what a recipe's machine is called by clouds, and its hosts")
    verb.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of one under configs/")
    add_overrides(verb, "mesh.slices=2")
    add_hardware(verb)
    verb.add_argument("--shell", action="store_true", help="print lines NAME=value for a shell")
    add_json(verb)

    verb = add_verb(verbs, "manifest", "print a recipe's job for Kubernetes (JobSet) or SkyPilot")
    verb.add_argument("kind", choices=("jobset", "skypilot"), help="what for")
    verb.add_argument("job_verb", metavar="VERB", choices=RECIPE_VERBS, help=", ".join(RECIPE_VERBS))
    verb.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of one under configs/")
    add_overrides(verb, "run.dir=/data/runs/mine")
    add_hardware(verb)
    verb.add_argument("--name", default="maxllm", help="of the job (default %(default)s)")
    verb.add_argument("--restarts", type=int, default=20, metavar="N", help="at most so many (default 20)")
    verb.add_argument("--spot", action="store_true", help="on spot capacity")
    verb.add_argument("--image", help="jobset: container image in which maxllm is installed")
    verb.add_argument("--bucket", help="jobset: Google Cloud Storage bucket to mount at /data")
    verb.add_argument("--service-account", help="jobset: the pods' account, which may use the bucket")


def add_convert(verbs: Any) -> None:
    """convert."""
    verb = add_verb(verbs, "convert", "convert between Hugging Face folders, GGUF files and run folders")
    verb.add_argument(
        "direction",
        choices=("from-hf", "from-gguf", "from-peft", "to-hf"),
        help="from-hf FOLDER RUN; from-gguf FILE RUN; from-peft FOLDER RUN; to-hf RUN FOLDER",
    )
    verb.add_argument("source", metavar="SRC", help="folder, file or (with --hub) the name of a repository")
    verb.add_argument("target", metavar="DST", type=local_path, help="folder to write")
    verb.add_argument("--base", metavar="RUN", type=run_folder, help="from-peft: the model that is adapted")
    verb.add_argument("--verify", action="store_true", help="compare logits with transformers (needs torch)")
    verb.add_argument("--hub", action="store_true", help="from-hf: download SRC from the Hugging Face hub")
    verb.add_argument(
        "--allow-pickle",
        action="store_true",
        help="from-hf: read .bin and .pth, with torch's safe loader",
    )
    verb.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="to-hf: of the weights (default: kept)",
    )
    add_push(verb)
    add_json(verb)


ROW_OPTIONS: dict[str, dict[str, Any]] = {
    "out": {"type": local_path, "metavar": "FILE.jsonl", "help": "file of rows of SFT to write"},
    "samples": {"type": positive, "metavar": "N", "help": "replies to each prompt (default 1)"},
    "batch": {"type": positive, "metavar": "ROWS", "help": "replies that are made at a time (default 16)"},
    "min_tokens": {"type": times, "metavar": "N", "help": "drop shorter replies"},
    "max_tokens": {"type": positive, "metavar": "N", "help": "drop longer replies"},
    "checker": {"metavar": "FILE.py:FUNCTION", "help": "(row) -> bool, or why it goes; or `answer`"},
    "novelty": {
        "type": share,
        "metavar": "F",
        "help": "drop a row whose ROUGE-L with an earlier one is F or more (0.7 with --bootstrap)",
    },
    "keep_rejected": {"action": "store_true", "help": "write what is dropped to FILE.rejected.jsonl"},
    "bootstrap": {
        "type": positive,
        "metavar": "K",
        "help": "show K prompts, ask for another one, and write a file of prompts",
    },
    "count": {"type": positive, "metavar": "N", "help": "ask so often for a new prompt (default 100)"},
}
"""Words of `generate --prompts`, which are fields of `stages.self_instruct.Wanted`."""


def add_generate(verbs: Any) -> None:
    """generate."""
    verb = add_verb(verbs, "generate", "complete prompts with the model of a run, or make a file of rows so")
    verb.add_argument("folder", metavar="RUN", type=run_folder, help="run folder of pretrain, sft or ppo")
    add_overrides(verb, "generation.temperature=0.8")
    add_checkpoint(verb)
    add_adapters(verb)
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="a prompt; give it again for more than one")
    what.add_argument("--prompts", metavar="SOURCE", help="file of rows of prompts, or tasks:SPLIT:COUNT")
    add_json(verb)
    rows = verb.add_argument_group("with --prompts (the same command goes on where it was interrupted)")
    for name, how in ROW_OPTIONS.items():
        rows.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **how)


def add_adapters(verb: Any) -> None:
    """--adapter of verbs that answer."""
    verb.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=named_run,
        metavar="NAME=RUN",
        help="adapters that were trained beside RUN's model; give it again for more (chat: /adapter NAME)",
    )


def check_generate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses words of `generate` that do not go together."""
    given = [f"--{name.replace('_', '-')}" for name in ROW_OPTIONS if name in options]
    if options.prompts is None and given:
        parser.error(f"{given[0]} goes with --prompts")
    if options.prompts is not None and options.adapter:
        parser.error("--adapter goes with --prompt; with --prompts give the adapters' own run as RUN")
    if options.prompts is not None and "out" not in options:
        parser.error("--prompts needs --out FILE.jsonl, the file that is to be made")


def add_readers(verbs: Any) -> None:
    """The verbs that take a run folder."""
    add_generate(verbs)
    verb = add_verb(verbs, "chat", "talk to the model of a run, line by line")
    verb.add_argument("folder", metavar="RUN", type=run_folder, help="run folder of sft or ppo")
    add_overrides(verb, "generation.temperature=0.7")
    add_checkpoint(verb)
    add_adapters(verb)

    verb = add_verb(verbs, "evaluate", "compute the held-out figures of a run")
    verb.add_argument("folder", metavar="RUN", type=run_folder, help="run folder of any stage")
    add_overrides(verb, "'data.heldout_sources=[\"mine.jsonl\"]' (pretrain: data.prepared_dir=…)")
    add_checkpoint(verb)
    add_json(verb)

    verb = add_verb(verbs, "export", "write a Hugging Face folder, checked against transformers")
    verb.add_argument("folder", metavar="RUN", type=run_folder, help="run folder of any stage that trains")
    verb.add_argument("out", metavar="OUT", type=local_path, help="folder to write")
    add_overrides(verb, "mesh.fsdp=4")
    add_checkpoint(verb)
    verb.add_argument(
        "--base", metavar="MODEL", help="of a LoRA run: write the adapters alone, for PEFT to load onto MODEL"
    )
    verb.add_argument("--critic", action="store_true", help="of a ppo run: write the value model instead")
    verb.add_argument(
        "--no-verify", action="store_true", help="do not compare with transformers (needs torch)"
    )
    add_push(verb)
    add_json(verb)

    verb = add_verb(verbs, "report", "draw report.html from a run folder or a folder of runs")
    verb.add_argument(
        "folder", metavar="FOLDER", type=local_path, help="run folder, or a folder that holds some"
    )
