"""What the verbs of the command line do: each reads its words and calls a stage, imported only then."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from maxllm.errors import DoesNotFit, RunFailed, UserError
from maxllm.options import RECIPE_VERBS, ROW_OPTIONS


def quickstart(options: argparse.Namespace) -> None:
    """maxllm quickstart"""
    from maxllm.stages import quickstart as stage
    from maxllm.stages import report as reports

    summary = stage.run(options.out, options.fast)
    page = reports.run(options.out)
    show(options, summary, "maxllm quickstart")
    if not options.json:
        if summary["export_greedy_identical"] is None:
            print("not checked: greedy output in transformers, because torch is not installed")
        print(f"Hugging Face folder: {options.out / 'hf'}\nreport: {page}")


def load_for(verb: str, name: str, overrides: Sequence[str]) -> Any:
    """A recipe (`Config`) for a verb that takes one.

    Raises:
      UserError: it is not a recipe of that verb's stage.
    """
    from maxllm import recipe

    config = recipe.load_recipe(name, overrides)
    wanted = "pretrain" if verb == "prepare" else verb
    if config.stage != wanted:
        raise UserError(f"{name} is a recipe for the stage {config.stage}, not {wanted}")
    return config


def train(options: argparse.Namespace) -> None:
    """maxllm prepare, and every stage"""
    from maxllm import recipe

    config = load_for(options.verb, options.recipe, options.overrides)
    if options.print_config:
        from maxllm.run.session import resolved

        config = resolved(config)
        print(json.dumps(config.model_dump(mode="json")) if options.json else recipe.dump(config), end="")
        return
    from maxllm.stages import prepare
    from maxllm.stages.registry import stage_of
    from maxllm.supervise.supervisor import supervise_where_needed

    if options.verb != "prepare":
        supervise_where_needed(config, options.restarts)
    run = prepare.run if options.verb == "prepare" else stage_of(config.stage).run
    show(options, run(config), f"maxllm {options.verb}")


def data(options: argparse.Namespace) -> None:
    """maxllm data"""
    if options.what != "show":
        from maxllm.data import instructions

        made = instructions.write(options.what, options.out, options.count, options.seed, options.task)
        show(options, made, f"maxllm data {options.what}")
        return
    from maxllm import recipe
    from maxllm.stages import data as stage

    rows = stage.rows(recipe.load_recipe(options.recipe, options.overrides), options.rows)
    if options.json:
        print(json.dumps(stage.as_json(rows), ensure_ascii=False))
        return
    from maxllm.report.rows import print_rows

    print_rows(rows)


def plan(options: argparse.Namespace) -> None:
    """maxllm plan"""
    os.environ["JAX_PLATFORMS"] = "cpu"  # the machine that is planned for is not here
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # how long compiling takes is a figure
    from maxllm import recipe

    config = recipe.load_recipe(options.recipe, options.overrides)
    if options.layout:
        print_layout(options, config)
        return
    if options.estimate:
        from maxllm.plan import estimate

        figures = estimate.run(config, options.hardware)
    elif options.search:
        from maxllm.stages import plan as stage

        # What is said on the command line is not searched for.
        fixed = [word.partition("=")[0] for word in options.overrides]
        figures = stage.search_best(config, options.hardware, fixed)
    else:
        from maxllm.stages import plan as stage

        figures = stage.run(config, options.hardware, options.tokens, options.price)
    if options.json:
        print(json.dumps(figures))
    else:
        from maxllm.report import plan as report

        show_plan = report.print_plan
        if options.estimate or options.search:
            show_plan = report.print_estimate if options.estimate else report.print_search
        show_plan(figures)
    if not figures["fits"]:
        from maxllm.report.plan import shortage

        raise DoesNotFit(shortage(figures))
    if figures.get("made_whole"):
        raise RunFailed(
            f"a fault of this mesh: XLA makes {len(figures['made_whole'])} arrays whole on every device "
            f"({figures['made_whole'][0]})"
        )


def print_layout(options: argparse.Namespace, config: Any) -> None:
    """maxllm plan --layout"""
    from maxllm.report import plan as report
    from maxllm.stages import plan as stage

    figures = stage.layout_of(config, options.hardware)
    if options.json:
        print(json.dumps(figures))
    else:
        report.print_layout(figures)


def convert(options: argparse.Namespace) -> None:
    """maxllm convert"""
    from maxllm.stages import convert as stage

    figures = stage.run(
        options.direction,
        options.source,
        options.target,
        verify=options.verify,
        allow_pickle=options.allow_pickle,
        hub=options.hub,
        dtype=options.dtype,
        push=options.push,
        base=options.base,
    )
    show(options, figures, f"maxllm convert {options.direction}")
    if "not_checked" in figures or options.json:
        return
    if options.verify and figures["max_abs_logit_diff"] is None:
        print("checked: every tensor's bytes; not checked: logits, because torch is not installed")


def generate(options: argparse.Namespace) -> None:
    """maxllm generate"""
    if options.prompts is not None:
        make_rows(options)
        return
    from maxllm.stages import chat as stage

    prompts = [stage.utf8(prompt) for prompt in options.prompt]
    replies = stage.generate(options.folder, prompts, options.overrides, options.checkpoint, options.adapter)
    if options.json:
        print(json.dumps(replies, ensure_ascii=False))
        return
    for reply in replies:
        print(f"{reply['adapter']}: {reply['text']}" if len(options.adapter) > 1 else reply["text"])


def make_rows(options: argparse.Namespace) -> None:
    """maxllm generate --prompts"""
    from maxllm.stages import self_instruct as stage

    given = {name: value for name, value in vars(options).items() if name in ROW_OPTIONS}
    wanted = stage.Wanted(prompts=options.prompts, **given)
    show(options, stage.run(options.folder, wanted, options.overrides, options.checkpoint), "maxllm generate")


def chat(options: argparse.Namespace) -> None:
    """maxllm chat"""
    from maxllm.stages import chat as stage

    lines = stage.typed_lines()
    stage.converse(options.folder, lines, print, options.overrides, options.checkpoint, options.adapter)


def evaluate(options: argparse.Namespace) -> None:
    """maxllm evaluate"""
    from maxllm.stages import evaluate as stage

    figures = stage.run(options.folder, options.overrides, options.checkpoint)
    show(options, figures, "maxllm evaluate")


def export(options: argparse.Namespace) -> None:
    """maxllm export"""
    from maxllm.stages import export as stage

    result = stage.run(
        options.folder,
        options.out,
        verify=not options.no_verify,
        overrides=options.overrides,
        base=options.base,
        critic=options.critic,
        push=options.push,
        which=options.checkpoint,
    )
    show(options, result, "maxllm export")
    checked = (
        options.base is not None
        or result.get("greedy_identical") is not None
        or result.get("max_abs_score_diff") is not None
    )
    if not checked and not options.json:
        why = "--no-verify was given" if options.no_verify else "torch is not installed"
        print(f"not checked in transformers, because {why}")


def report(options: argparse.Namespace) -> None:
    """maxllm report"""
    from maxllm.stages import report as stage

    print(stage.run(options.folder))


def doctor(options: argparse.Namespace) -> None:
    """maxllm doctor"""
    from maxllm.stages import doctor as stage

    found = stage.run()
    problems = found["problems"]
    show(options, found if options.json else found | {"problems": len(problems)}, "maxllm doctor")
    if problems:
        raise RunFailed(f"a run would fail here: {'; '.join(problems)}")


def machine(options: argparse.Namespace) -> None:
    """maxllm machine"""
    from maxllm import recipe
    from maxllm.stages import machine as stage

    facts = stage.machine_of(recipe.load_recipe(options.recipe, with_hardware(options))).facts()
    if options.shell:
        print(stage.as_lines(facts), end="")
    else:
        show(options, facts, "maxllm machine")


def manifest(options: argparse.Namespace) -> None:
    """maxllm manifest"""
    from maxllm.stages import manifest as stage

    overrides = with_hardware(options)
    job = stage.Job(
        words=(options.job_verb, options.recipe, *overrides),
        config=load_for(options.job_verb, options.recipe, overrides),
        name=options.name,
        restarts=options.restarts,
        spot=options.spot,
        image=options.image,
        bucket=options.bucket,
        service_account=options.service_account,
    )
    print(stage.run(options.kind, job), end="")


def with_hardware(options: argparse.Namespace) -> list[str]:
    """The overrides, of which --hardware is one."""
    return [*options.overrides, *([f"run.hardware={options.hardware}"] if options.hardware else [])]


def show(options: argparse.Namespace, figures: dict[str, Any], title: str) -> None:
    """Figures as a table, or as JSON."""
    if options.json:
        print(json.dumps(figures, ensure_ascii=False))
        return
    from maxllm.report.table import print_table

    print_table(figures, title)


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "quickstart": quickstart,
    **dict.fromkeys(RECIPE_VERBS, train),
    "data": data,
    "plan": plan,
    "convert": convert,
    "generate": generate,
    "chat": chat,
    "evaluate": evaluate,
    "export": export,
    "report": report,
    "machine": machine,
    "manifest": manifest,
    "doctor": doctor,
}
