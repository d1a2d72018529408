"""`maxllm convert` and `maxllm export` from the outside: checks that can fail, errors that leave nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from maxllm import cli
from maxllm.config.mesh import MeshConfig
from maxllm.errors import RunFailed, UserError
from maxllm.folder import RunFolder
from maxllm.hf import verify_tokenizer
from maxllm.hf.export import export
from maxllm.hf.folder import open_model
from maxllm.hf.load import load
from maxllm.hf.verify import check_tensors
from maxllm.hf.write import hf_tensors
from maxllm.model.llama import Llama
from maxllm.parallel.mesh import make_mesh
from maxllm.run.parents import check_parents, in_use, record_parents
from maxllm.stages import convert
from maxllm.steps.state import abstract, init_params

DTYPES = ("float32", "float16", "bfloat16")
Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tiny_model, params_of, tiny_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """One small model as Hugging Face folders, by type."""
    config = tiny_model(vocab_size=512)
    place = tmp_path_factory.mktemp("models")
    for dtype in DTYPES:
        export(params_of(Llama(config)), config, tiny_tokenizer, place / dtype, dtype=dtype)
    return {dtype: place / dtype for dtype in DTYPES}


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """answer(words) -> (exit code, stdout, stderr) of the command line."""

    def ask(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return ask


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


# There and back


def test_damaged_weights_are_not_converted(folders, tmp_path, answer) -> None:
    """A flipped bit, a chunk of zeros and a missing one; nothing is left at the target."""
    assert answer("convert", "from-hf", folders["float32"], tmp_path / "run")[0] == 0
    for number, damage in enumerate(("flip", "zeros", "missing")):
        run = shutil.copytree(tmp_path / "run", tmp_path / damage)
        chunk = run / "checkpoints" / "0" / "params" / "decoder.layers.mlp.w_up" / f"{number % 2}.0.0"
        content = chunk.read_bytes()
        chunk.unlink()
        if damage != "missing":
            flipped = bytes([content[0] ^ 0x40]) + content[1:]
            chunk.write_bytes(flipped if damage == "flip" else bytes(len(content)))
        for verb in (("convert", "to-hf"), ("export",)):
            code, _, err = answer(*verb, run, tmp_path / "out")
            assert code == 1 and "is damaged: in params, array decoder/layers/mlp/w_up" in err, err
            assert not (tmp_path / "out").exists()


def test_replacing_what_others_began_from_is_said(folders, tmp_path, answer) -> None:
    """The same weights again: who began from them goes on; others: refused."""
    target = tmp_path / "run"
    assert answer("convert", "from-hf", folders["float32"], target)[0] == 0
    target_run, child = RunFolder(target), RunFolder(tmp_path / "child")
    child.path.mkdir()
    record_parents(child, {"policy": target_run.find()}, print)
    code, _, err = answer("convert", "from-hf", folders["float32"], target)
    assert code == 0 and "from which" in err and "child began" in err
    check_parents(child, {"policy": target_run.find()})
    assert list(in_use(target_run)) == [0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_verified(
    dtype: str, folders: dict[str, Path], tmp_path: Path, answer: Answer
) -> None:
    """Byte for byte in every type, and both directions compare their own result with the source."""
    for direction, source, target in (
        ("from-hf", folders[dtype], tmp_path / "run"),
        ("to-hf", tmp_path / "run", tmp_path / "back"),
    ):
        code, out, err = answer("convert", direction, source, target, "--verify", "--json")
        assert code == 0, err
        figures = json.loads(out)
        assert figures["identical_tensors"] == figures["tensors"] == len(weights(folders[dtype]))
        assert figures["max_abs_logit_diff"] < 1e-4 and figures["top1_agreement"] == 1
        assert 0 <= figures["mean_kl"] < 1e-9
        assert figures["seconds"] > 0 and figures["peak_rss_bytes"] > 10**8
    source, back = (folder / "model.safetensors" for folder in (folders[dtype], tmp_path / "back"))
    assert source.read_bytes() == back.read_bytes()


@pytest.mark.parametrize(("dtype", "least", "most"), [("float16", 1e-5, 1e-2), ("bfloat16", 1e-4, 1e-1)])
def test_rounding_on_the_way_out_is_told(
    dtype: str, least: float, most: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Logits of order 1 move by about 2^-11 or 2^-8 where weights are rounded to 11 or 8 bits."""
    convert.run("from-hf", str(folders["float32"]), tmp_path / "run")
    figures = convert.run("to-hf", str(tmp_path / "run"), tmp_path / "out", verify=True, dtype=dtype)
    assert least < figures["max_abs_logit_diff"] < most
    assert figures["bytes"] == 2 * figures["parameters"]


def test_without_torch_bytes_are_still_compared(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(convert, "has_torch", lambda: False)
    code, out, _ = answer("convert", "from-hf", folders["float32"], tmp_path / "run", "--verify")
    assert code == 0
    assert "not checked: logits, because torch is not installed" in out and "identical_tensors" in out


# Checks that can fail


def test_a_wrong_tensor_is_named(folders: dict[str, Path], tiny_model, params_of) -> None:
    """One bit of one layer is enough."""
    config = tiny_model(vocab_size=512)
    model, params = open_model(folders["float32"]), params_of(Llama(config))
    assert check_tensors(model.source, params, config) == len(model.source.tensors)
    broken = jax.tree.map(np.array, params)
    broken["decoder"]["layers"]["mlp"]["w_up"][1, 3, 5] = np.nextafter(
        broken["decoder"]["layers"]["mlp"]["w_up"][1, 3, 5], np.float32(9)
    )
    with pytest.raises(RunFailed, match=r"1 of 21 tensors .*: model.layers.1.mlp.up_proj.weight$"):
        check_tensors(model.source, broken, config)


def test_other_logits_are_an_error_and_leave_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    def off(folder: Path, tokens: np.ndarray) -> np.ndarray:
        return hf_logits(folder, tokens) + 3 * (np.arange(512) == 7)

    hf_logits = convert.hf_logits
    monkeypatch.setattr(convert, "hf_logits", off)
    code, _, err = answer("convert", "from-hf", folders["float32"], tmp_path / "run", "--verify")
    assert code == 1 and "logits differ by up to 3" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"tensor": 2, "fsdp": 4}, {"data": 4, "tensor": 2}])
def test_a_sharded_model_is_read_in_parts_and_written_whole(
    mesh: dict[str, int], folders: dict[str, Path], tiny_model
) -> None:
    """Eight devices, each reading what it will hold; bfloat16, so that bits travel as integers."""
    model = open_model(folders["bfloat16"])
    config = tiny_model(vocab_size=512, n_kv_heads=2)
    wanted = abstract(lambda key: init_params(Llama(config), key), make_mesh(MeshConfig(**mesh)))
    wanted = jax.tree.map(lambda leaf: leaf.update(dtype="bfloat16"), wanted)
    params = load(model.source, config, wanted)
    w_gate = params["decoder"]["layers"]["mlp"]["w_gate"]
    assert w_gate.sharding == wanted["decoder"]["layers"]["mlp"]["w_gate"].sharding
    assert w_gate.addressable_shards[0].data.size < w_gate.size
    theirs = weights(folders["bfloat16"])
    ours = dict(hf_tensors(params, config))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


# Errors


def broken_source(kind: str, source: Path, place: Path) -> Path:
    """A copy of a model with something wrong about it."""
    folder = place / "source"
    shutil.copytree(source, folder)
    tensors = weights(folder)
    if kind == "missing and extra":
        tensors["model.layers.0.mlp.extra"] = tensors.pop("model.norm.weight")
    elif kind == "misshapen":
        tensors["model.norm.weight"] = np.ones(31, np.float32)
    elif kind == "cut short":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        return folder
    elif kind == "architecture":
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | {"model_type": "gpt2"}))
    elif kind == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            (folder / name).unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing and extra", ("model.norm.weight is missing", "model.layers.0.mlp.extra is not part of")),
        ("misshapen", ("model.norm.weight is (31,), (32,) expected",)),
        ("cut short", ("model.safetensors is not a whole safetensors file",)),
        ("architecture", ("gpt2", "llama")),
        ("no tokenizer", ("tokenizer",)),
    ],
)
def test_a_source_that_is_not_right_is_refused_before_anything_is_written(
    kind: str, says: tuple[str, ...], folders: dict[str, Path], tmp_path: Path, answer: Answer
) -> None:
    source = broken_source(kind, folders["float32"], tmp_path)
    code, _, err = answer("convert", "from-hf", source, tmp_path / "run")
    assert code == 2
    assert all(part in err for part in says), err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_stands_at_the_target_is_kept(folders: dict[str, Path], tmp_path: Path, answer: Answer) -> None:
    """A former conversion is replaced; anything else is not ours to touch."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    code, _, err = answer("convert", "from-hf", folders["float32"], tmp_path / "notes")
    assert code == 2 and "not ours to replace" in err
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    for dtype in ("float32", "bfloat16"):
        assert answer("convert", "from-hf", folders[dtype], tmp_path / "run")[0] == 0


def test_a_name_that_is_not_there_tells_of_the_hub(answer: Answer, tmp_path: Path) -> None:
    code, _, err = answer("convert", "from-hf", "nobody/no-model", tmp_path / "run")
    assert code == 2 and "add --hub" in err


# The hub


def test_offline_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """Asked for, not to be had: what is written stays, what is not is not begun."""

    def unreachable(*arguments: object, **more: object) -> None:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    code, _, err = answer("convert", "from-hf", "someone/model", tmp_path / "run", "--hub")
    assert code == 2 and "cannot be downloaded" in err and "We couldn't connect to the hub" in err
    assert list(tmp_path.iterdir()) == []
    assert answer("convert", "from-hf", folders["float32"], tmp_path / "run")[0] == 0
    code, _, err = answer("convert", "to-hf", tmp_path / "run", tmp_path / "out", "--push", "me/model")
    assert code == 2 and f"{tmp_path / 'out'} is written, but cannot be pushed to me/model" in err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_push_goes_to_a_private_repository(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
) -> None:
    calls: list[tuple[str, Any]] = []

    def create(self: object, name: str, **more: Any) -> None:
        calls.append((name, more))

    def upload(self: object, *, repo_id: str, folder_path: Path, **more: Any) -> SimpleNamespace:
        calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return SimpleNamespace(commit_url="the commit")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    convert.run("from-hf", str(folders["float32"]), tmp_path / "run")
    figures = convert.run("to-hf", str(tmp_path / "run"), tmp_path / "out", push="me/model")
    assert figures["pushed"] == "the commit"
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1][0] == "me/model" and {"config.json", "model.safetensors", "README.md"} <= set(calls[1][1])
    with pytest.raises(UserError, match="--push goes with to-hf"):
        convert.run("from-hf", str(folders["float32"]), tmp_path / "other", push="me/model")
    assert not (tmp_path / "other").exists()


# What the files say


def test_generation_defaults_go_through_a_run_folder(
    folders: dict[str, Path], tmp_path: Path, answer: Answer
) -> None:
    """Followed by the run as far as our decoding goes, and the same file on the way out."""
    source = Path(shutil.copytree(folders["float32"], tmp_path / "source"))
    kept = {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 5, "do_sample": True, "min_p": 0.1}
    kept |= {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "transformers_version": "4.45.0"}
    (source / "generation_config.json").write_text(json.dumps(kept))
    code, out, err = answer("convert", "from-hf", source, tmp_path / "run", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["kept_but_not_followed"] == "min_p=0.1" and told["context"] == 64
    assert {"id": 2, "token": "</s>", "in": ["generation_config.json", "config.json"]} in told["stop_tokens"]
    assert answer("convert", "to-hf", tmp_path / "run", tmp_path / "back", "--verify")[0] == 0
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == kept
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["generation"]
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (0.6, 20, 0.9)


class Off:
    """A tokenizer of `transformers` that cuts one word otherwise."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.theirs, name)

    def __call__(self, text: str, **more: Any) -> Any:
        found = self.theirs(text, **more)
        return found | {"input_ids": [9]} if text == "Hello" else found


@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_another_tokenization_is_an_error_and_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, direction: str
) -> None:
    """Here and in transformers 'Hello' has other ids: whichever way the model goes, it does not arrive."""
    source: Path = folders["float32"]
    if direction == "to-hf":
        assert answer("convert", "from-hf", source, tmp_path / "run")[0] == 0
        source = tmp_path / "run"
    load = verify_tokenizer.load
    monkeypatch.setattr(verify_tokenizer, "load", lambda *where: Off(load(*where)))
    code, _, err = answer("convert", direction, source, tmp_path / "out", "--verify")
    assert code == 1 and "the tokenizer does not say what transformers says: 'Hello'" in err
    assert not (tmp_path / "out").exists()


def test_weights_that_hold_nan_are_named(folders: dict[str, Path], tmp_path: Path, answer: Answer) -> None:
    source = Path(shutil.copytree(folders["float32"], tmp_path / "source"))
    tensors = weights(source)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, source / "model.safetensors")
    code, _, err = answer("convert", "from-hf", source, tmp_path / "run", "--verify")
    assert code == 1 and "hold NaN or infinity: in model.norm.weight" in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
