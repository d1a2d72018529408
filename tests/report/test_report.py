"""The report page: what it shows of whole, unfinished and broken folders, and that it is safe to open."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from maxllm.errors import UserError
from maxllm.stages import sft
from maxllm.stages.report import run as write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}
HARDWARE = {"device_kind": "cpu", "devices": 1, "cpu": "A <fast> & plain chip", "python": "3.11.7"}
NASTY = "<script>alert('1')</script> & \"more\""


class Page(HTMLParser):
    """A parsed page that has to be well formed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader reads, white space made even."""
        return " ".join(" ".join(self.words).split())

    def classes(self, text: str) -> str:
        """The classes of the element whose text begins so."""
        found = re.search(rf'class="([^"]*)">{re.escape(text)}', self.source)
        assert found is not None, f"no element with {text!r}"
        return found[1]

    def row(self, name: str) -> str:
        """The source of a line of the before/after table."""
        found = re.search(
            rf'<tr>\s*<th scope="row">{re.escape(html.escape(name).replace("&#x27;", "&#39;"))}</th>.*?</tr>',
            self.source,
            re.S,
        )
        assert found is not None, f"no line {name!r}"
        return found[0]


def make_run(
    folder: Path,
    stage: str,
    heldout: list[dict[str, float]],
    steps: int = 40,
    finished: bool = True,
    **facts: Any,
) -> Path:
    """A run folder; its held-out figures are evenly spaced from step 0 to the last."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"stage: {stage}\nrun:\n  steps: {steps}\n  note: '{NASTY[:8]}'\n")
    gap = steps // max(len(heldout) - 1, 1)
    lines: list[dict[str, Any]] = [
        {"step": step, "seconds": step / 2, "loss": 9 - step / 10, "score": step / 40, "kl": step / 80}
        for step in range(5, steps + 1, 5)
    ]
    lines += [{"step": n * gap, "seconds": n * gap / 2, "heldout": h} for n, h in enumerate(heldout)]
    lines.sort(key=lambda line: line["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"stage": stage, "steps": steps, "parameters": 1967808, "tokens": 1064960, "seconds": 250.0}
        summary |= {"heldout_first": heldout[0], "heldout_last": heldout[-1], "hardware": HARDWARE}
        (folder / "summary.json").write_text(json.dumps(summary | facts))
    return folder


def make_pretrain(folder: Path, last: float = 2.384, **options: Any) -> Path:
    """A pretraining run."""
    baselines = {"bits_per_byte_unigram": 5.1599, "bits_per_byte_bigram": 3.5933}
    items = {"heldout_bytes": 89259, "heldout_documents": 47}
    heldout = [{"loss": 7.6, "bits_per_byte": 4.402}, {"loss": 4.1, "bits_per_byte": last}]
    return make_run(folder, "pretrain", heldout, **({**baselines, **items} | options))


def make_quickstart(folder: Path, **changes: Any) -> Path:
    """A complete quickstart folder."""
    make_pretrain(folder / "pretrain")
    sft = [{"loss": 9.9, "exact_match": 0.0}, {"loss": 1.1, "exact_match": 0.3}]
    make_run(folder / "sft", "sft", sft, heldout_items=300)
    reward = [{"loss": 0.7, "accuracy": 0.5}, {"loss": 0.2, "accuracy": 0.914}]
    make_run(folder / "reward", "reward", reward, heldout_items=500)
    ppo = [
        {"score": s, "kl": s + 0.5, "exact_match": s / 4, "exact_match_greedy": s / 2}
        for s in (-0.5, 0.25, 1.0)
    ]
    make_run(folder / "ppo", "ppo", ppo, heldout_items=300)
    summary: dict[str, Any] = {
        "bits_per_byte": 2.384,
        "bits_per_byte_unigram": 5.1599,
        "bits_per_byte_bigram": 3.5933,
        "sft_exact_match_before": 0.0,
        "sft_exact_match_after": 0.3,
        "reward_pair_accuracy": 0.914,
        "ppo_score_before": -0.5,
        "ppo_score_after": 1.0,
        "ppo_exact_match_before": 0.211,
        "ppo_exact_match_after": 0.405,
        "ppo_exact_match_greedy_before": 0.302,
        "ppo_exact_match_greedy_after": 0.456,
        "ppo_kl": 1.5,
        "export_greedy_identical": True,
        "heldout_items": {
            "bits_per_byte_bytes": 89259,
            "bits_per_byte_documents": 47,
            "sft_exact_match": 300,
            "reward_pair_accuracy": 500,
            "ppo": 300,
            "export_prompts": 12,
        },
        "seconds": {"prepare": 7.4, "pretrain": 250.0, "sft": 253.0, "ppo": 200.0, "total": 710.4},
        "parameters": 1967808,
        "fast": False,
        "hardware": HARDWARE,
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    samples = {
        "text": [{"prompt": "李白\n\n", "continuation": f"春風 {NASTY}"}],
        "tasks": [
            {"prompt": "Sort.\n312", "answer": "123", "pretrained": NASTY, "sft": "132", "ppo": " 123\n"},
            {"prompt": "Sort.\n54", "answer": "45", "pretrained": "", "sft": "45", "ppo": "45"},
        ],
    }
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def assert_self_contained(page: Page) -> None:
    """Nothing is fetched and nothing runs; references stay inside the page and are unambiguous."""
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{name} on <{tag}>"
            if name in {"href", "src", "xlink:href", "srcset", "action", "data"}:
                assert value and value[0] == "#" and value[1:] in ids, f"<{tag} {name}={value}>"
    for target in re.findall(r"url\(\s*[\"']?([^)\"']*)", page.source):
        assert target[0] == "#" and target[1:] in ids
    assert "@import" not in page.source
    assert not re.search(r"https?://", page.source)


def test_one_run(tmp_path: Path) -> None:
    folder = make_pretrain(tmp_path / "run")
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path)
    assert_self_contained(page)
    for words in ("Pretraining", "40 steps in 4 min 10 s", "unigram 5.16", "bigram 3.59", "2.38"):
        assert words in page.text
    for words in ("47 documents, 89,259 bytes", "1,967,808", "A <fast> & plain chip", "note: '<script>'"):
        assert words in page.text
    assert "better than the bigram baseline" in page.row("Bits per byte of unseen text")
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_the_drawings_take_the_colours_of_the_page(tmp_path: Path) -> None:
    page = Page(write_report(make_pretrain(tmp_path / "run")))
    for svg in re.findall(r"<svg.*?</svg>", page.source, re.S):
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
        assert "currentColor" in svg and "var(--curve-0)" in svg
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert "held out from 4.40 at step 0 to 2.38 at step 40; unigram at 5.16" in (labels[1] or "")


def test_a_cut_last_line_and_numbers_that_are_not_finite_do_no_harm(tmp_path: Path) -> None:
    folder = make_pretrain(tmp_path / "run", finished=False)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 45, "seconds": 23, "loss": NaN, "skipped": 0.2}\n{"step": 50, "sec')
    page = Page(write_report(folder))
    assert "unfinished, at step 45 of 40" in page.text
    assert "training, last 5.00" in page.text and "nan" not in page.text.lower()
    assert "an update was skipped because it was not finite" in page.text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("stage: ppo\nrun: {steps: 40}\n")
    page = Page(write_report(folder))
    assert "unfinished, at step 0 of 40" in page.text
    assert "not there yet" in page.row("Reward model's score, PPO")
    assert not any(tag == "svg" for tag, _ in page.tags)
    (folder / "metrics.jsonl").write_text(
        '{"step": 0, "seconds": 1, "heldout": {"score": -0.5, "kl": 0.0}}\n'
    )
    row = Page(write_report(folder)).row("Reward model's score, PPO")
    assert "-0.50" in row and "not there yet" in row and "verdict" not in row


def test_quickstart(tmp_path: Path) -> None:
    page = Page(write_report(make_quickstart(tmp_path / "quickstart")))
    assert_self_contained(page)
    assert "1,967,808 parameters" in page.text and "in 11 min 50 s" in page.text
    for name, shown in {
        "Bits per byte of unseen text": ("5.16", "3.59", "2.38", "89,259 bytes"),
        "Right answers after SFT": ("0.0%", "30.0%", "300 questions"),
        "Pairs the reward model orders right": ("50.0%", "91.4%", "500 pairs"),
        "Reward model's score, PPO": ("-0.50", "1.00"),
        "Right answers, sampled, PPO": ("21.1%", "40.5%", "300 questions"),
        "Right answers, greedy, PPO": ("30.2%", "45.6%"),
        "KL to the SFT model, PPO": ("0.00", "1.50"),
        "Exported model, greedy text": ("identical", "12 prompts"),
    }.items():
        row = page.row(name)
        assert all(figure in row for figure in shown), f"{name}: {row}"
        assert ("verdict better" in row) == ("KL" not in name)
    assert "not there yet" not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 9
    assert sum(tag == "details" for tag, _ in page.tags) == 4
    assert "fast road" not in page.text


def test_samples_are_escaped_and_judged(tmp_path: Path) -> None:
    page = Page(write_report(make_quickstart(tmp_path / "quickstart")))
    assert NASTY in page.text and "<script" not in page.source
    assert "after pretraining 0 of 2; after SFT 1 of 2; after PPO 2 of 2" in page.text
    assert page.source.count('class="wrong">✗') == 3 and page.source.count('class="right">✓') == 3
    assert "nothing" in page.text
    assert "<pre><b>李白" in page.source


def test_times_add_up_to_the_bars(tmp_path: Path) -> None:
    page = Page(write_report(make_quickstart(tmp_path / "quickstart")))
    widths = [float(width) for width in re.findall(r'class="bar" style="width: ([\d.]+)%"', page.source)]
    assert widths == pytest.approx([100 * s / 710.4 for s in (7.4, 250.0, 253.0, 200.0)], abs=0.06)


def test_what_did_not_improve_is_not_called_better(tmp_path: Path) -> None:
    changes = {
        "bits_per_byte": 3.7,
        "sft_exact_match_after": 0.0,
        "reward_pair_accuracy": 0.53,
        "ppo_score_after": -0.9,
        "ppo_exact_match_after": 0.1,
        "ppo_exact_match_greedy_after": 0.33,
        "export_greedy_identical": False,
        "fast": True,
    }
    page = Page(write_report(make_quickstart(tmp_path / "quickstart", **changes)))
    assert "verdict better" not in page.source
    assert "verdict worse" in page.row("Bits per byte of unseen text")
    assert "verdict same" in page.row("Right answers after SFT")
    assert "within what chance gives with 500" in page.row("Pairs the reward model orders right")
    assert "✗ lower" in page.row("Reward model's score, PPO")
    assert "✗ worse" in page.row("Right answers, sampled, PPO")
    assert "within what chance gives with 300" in page.row("Right answers, greedy, PPO")
    assert "not the same text" in page.row("Exported model, greedy text")
    assert "does not beat counting bytes" in page.text and "no better than a coin" in page.text
    assert "fast road" in page.text


def test_a_score_that_rises_alone_is_pointed_out(tmp_path: Path) -> None:
    changes = {"ppo_exact_match_after": 0.2, "ppo_exact_match_greedy_after": 0.3}
    page = Page(write_report(make_quickstart(tmp_path / "quickstart", **changes)))
    assert "verdict better" in page.row("Reward model's score, PPO")
    assert "reward hacking" in page.text


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "not checked: torch is missing"), (True, "identical"), (False, "differs")]
)
def test_export_check(tmp_path: Path, value: bool | None, shown: str) -> None:
    folder = make_quickstart(tmp_path / "quickstart", export_greedy_identical=value)
    row = Page(write_report(folder)).row("Exported model, greedy text")
    assert shown in row
    assert ("verdict better" in row) == (value is True)


def test_shares_are_not_judged_without_knowing_how_many_items_stand_behind_them() -> None:
    facts = {"sft_exact_match_before": 0.0, "sft_exact_match_after": 0.9}
    assert sft.rows(facts)[0].verdict.kind == "none"
    for items, kind in ((5, "better"), (2, "same")):
        known = facts | {"heldout_items": {"sft_exact_match": items}}
        assert sft.rows(known)[0].verdict.kind == kind


def test_unfinished_quickstart(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    make_pretrain(folder / "pretrain")
    sft = [{"loss": 9.9, "exact_match": 0.0}, {"loss": 1.5, "exact_match": 0.07}]
    make_run(folder / "sft", "sft", sft, finished=False)
    with (folder / "sft" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 45, "seconds": 9.0, "loss": 1.0}\n')
    page = Page(write_report(folder))
    assert_self_contained(page)
    assert "Complete: pretrain; begun: sft (unfinished, at step 45 of 40); not there yet:" in page.text
    assert "not there yet: reward, ppo and export." in page.text
    assert "better than the bigram baseline" in page.row("Bits per byte of unseen text")
    row = page.row("Right answers after SFT")
    assert "7.0%" in row and "so far, at step 40" in row and "verdict better" not in row
    assert "not there yet" in page.row("Exported model, greedy text")
    assert page.text.count("not there yet") >= 8


def test_a_quickstart_whose_runs_were_cleared_away(tmp_path: Path) -> None:
    whole = make_quickstart(tmp_path / "whole")
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "summary.json").write_bytes((whole / "summary.json").read_bytes())
    page = Page(write_report(folder))
    assert "45.6%" in page.text and "not there yet" in page.text


def test_folder_of_runs(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    make_pretrain(folder / "small", last=2.9)
    make_pretrain(folder / "large", last=3.9)
    (folder / "notes").mkdir()
    page = Page(write_report(folder))
    assert_self_contained(page)
    assert "2 runs in sweep" in page.text and "Complete: large and small." in page.text
    assert page.text.index("config.yaml of large") < page.text.index("config.yaml of small")
    assert page.source.count("verdict better") == 1 and page.source.count("verdict worse") == 1
    assert "8 min 20 s" in page.text


def test_runs_of_several_folds_are_told_as_one(tmp_path: Path) -> None:
    """Mean and standard deviation of 1, 2 and 6 are 3 and 2.6; another recipe is no part of it."""
    for fold, loss, seed in (("1/3", 1.0, 0), ("2/3", 2.0, 0), ("3/3", 6.0, 0), ("1/3", 99.0, 1)):
        name = f"{fold[0]}-{seed}"
        folder = make_run(tmp_path / "folds" / name, "sft", [{"loss": 9.0}, {"loss": loss}])
        recipe = f"stage: sft\nrun: {{steps: 40, dir: runs/{name}, seed: {seed}}}\ndata: {{fold: {fold}}}\n"
        (folder / "config.yaml").write_text(recipe)
    page = Page(write_report(tmp_path / "folds"))
    assert "3 runs of the folds 1/3, 2/3, 3/3: loss 3 ± 2.6 (mean ± standard deviation)" in page.text
    assert page.source.count("Cross-validation") == 1


def test_a_run_of_dpo(tmp_path: Path) -> None:
    """With right answers where rows have them, and without."""
    heldout = [{"accuracy": 0.0, "margin": 0.0, "loss": 0.69}, {"accuracy": 0.91, "margin": 1.5, "loss": 0.3}]
    page = Page(write_report(make_run(tmp_path / "pairs", "dpo", heldout, heldout_items=500)))
    row = page.row("Pairs the policy orders right, DPO")
    assert "coin 50.0%" in row and "91.0%" in row and "500 pairs" in row and "verdict better" in row
    assert "Right answers" not in page.text and sum(tag == "svg" for tag, _ in page.tags) == 3
    known = [figures | {"exact_match": share} for figures, share in zip(heldout, (0.4, 0.8), strict=True)]
    more = {"heldout_items": 500, "heldout_questions": 300}
    row = Page(write_report(make_run(tmp_path / "dpo", "dpo", known, **more))).row("Right answers after DPO")
    assert "40.0%" in row and "80.0%" in row and "300 questions" in row and "verdict better" in row


def test_a_stage_this_report_does_not_know(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "grpo", "grpo", [{"margin_mean": 0.1}, {"margin_mean": 0.4}])
    page = Page(write_report(folder))
    assert "margin mean" in page.text and sum(tag == "svg" for tag, _ in page.tags) == 2


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "corpus").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no run.*config\.yaml or metrics\.jsonl"):
        write_report(tmp_path / "empty")
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "nowhere")
    assert not list(tmp_path.rglob("report.html"))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_summary_is_named_and_the_former_page_stays(tmp_path: Path, text: str) -> None:
    folder = make_pretrain(tmp_path / "run")
    former = write_report(folder).read_bytes()
    (folder / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == former


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = make_quickstart(tmp_path / "quickstart")
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_text_without_a_utf8_form_is_written_all_the_same(tmp_path: Path) -> None:
    folder = make_quickstart(tmp_path / "quickstart")
    (folder / "samples.json").write_text(
        '{"text": [{"prompt": "a", "continuation": "\\ud800b"}], "tasks": null}'
    )
    assert "<b>a</b>?b" in Page(write_report(folder)).source
