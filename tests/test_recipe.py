"""Recipes: every mistake is one sentence that names the field; every field is described; all of ours load."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from maxllm import recipe
from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.config.section import Effect, section_in
from maxllm.config.stages import TRAINED
from maxllm.errors import UserError

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))

MODEL = {
    "vocab_size": 512,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 128,
    "max_seq_len": 64,
}
TREE = {
    "stage": "pretrain",
    "run": {"dir": "runs/x", "steps": 10},
    "model": MODEL,
    "tokenizer": {"path": "runs/tokenizer.model", "vocab_size": 512},
    "data": {"sources": ["a.txt"], "prepared_dir": "runs/corpus"},
    "batch": {"rows": 8, "sequence_length": 64},
}


def write(path, tree):
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base.yaml", TREE)


SFT = ("stage=sft", "start.policy=runs/a")
PPO = ("stage=ppo", "start={policy: a, reward: b}", "generation={max_new_tokens: 8, temperature: 1.0}")


def sentence_of(base, *overrides):
    """What the user reads: always one line."""
    with pytest.raises(UserError) as error:
        recipe.load_recipe(base, overrides)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence
    return sentence


# Mistakes


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.lr=3e-4", "unknown key 'optimizer.lr'; the nearest is 'optimizer.learning_rate'"),
        ("batch.length=8", "unknown key 'batch.length'; the nearest is 'batch.sequence_length'"),
        (
            "optimizer.learning_rat=1",
            "unknown key 'optimizer.learning_rat'; the nearest is 'optimizer.learning_rate'",
        ),
        ("batch.row=8", "unknown key 'batch.row'; the nearest is 'batch.rows'"),
        ("model.dmodel=8", "unknown key 'model.dmodel'; the nearest is 'model.d_model'"),
        (
            "model.rope_scaling.factr=8",
            "unknown key 'model.rope_scaling.factr'; the nearest is 'model.rope_scaling.factor'",
        ),
        ("data.clean.min_char=1", "unknown key 'data.clean.min_char'; the nearest is 'data.clean.min_chars'"),
        ("optimiser.eps=1", "unknown key 'optimiser'; the nearest is 'optimizer'"),
        ("learning_rate=1", "unknown key 'learning_rate'; the nearest is 'optimizer.learning_rate'"),
    ],
)
def test_an_unknown_key_names_the_nearest(base, override, sentence):
    assert sentence_of(base, override).startswith(sentence)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.steps=many", ["run.steps was given 'many'", "valid integer", "Optimizer steps"]),
        ("run.steps=1.5", ["run.steps was given 1.5", "integer"]),
        ("run.steps=0", ["run.steps was given 0", "greater than 0"]),
        ("run.steps=true", ["run.steps", "was given True, which is neither a number"]),
        ("optimizer.learning_rate=true", ["optimizer.learning_rate", "was given True"]),
        ("run.dir=ftp://bucket/x", ["run.dir", "ftp://bucket/x is neither a local path nor in a bucket"]),
        ("run.seed=-1", ["run.seed was given -1", "greater than or equal to 0"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate was given 'fast'", "Peak learning rate"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate was given nan", "finite"]),
        ("optimizer.schedule=cosin", ["optimizer.schedule was given 'cosin'", "'cosine'", "'linear'"]),
        ("optimizer.beta1=1", ["optimizer.beta1 was given 1", "less than 1"]),
        ("model.dtype=float16", ["model.dtype was given 'float16'", "'float32'", "'bfloat16'"]),
        ("data.sources=a.txt", ["data.sources was given 'a.txt'", "tuple"]),
        ("data.template=llama", ["data.template: llama is none of chatml, llama2,", "ends in .jinja"]),
        ("stage=grpo", ["stage was given 'grpo'", "'pretrain'", "'ppo'"]),
        ("batch=8", ["batch was given 8", "Batch shape"]),
        ("model.tie_embeddings=perhaps", ["model.tie_embeddings was given 'perhaps'", "boolean"]),
    ],
)
def test_a_wrong_value_names_field_value_and_what_is_allowed(base, override, parts):
    sentence = sentence_of(base, override)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.n_heads=5"], "model: n_heads=5 does not divide d_model=64; give head_dim"),
        (["model.n_kv_heads=3"], "model: n_kv_heads=3 does not divide n_heads=4"),
        (["model.head_dim=7"], "model: head_dim=7 is odd; rotary embeddings need pairs"),
        (
            ["model.attention=cudnn", "model.attention_dropout=0.1"],
            "model: attention=cudnn has no attention_dropout; give attention=xla",
        ),
        (
            ["model.attention=cudnn", "model.dtype=float32"],
            "model: attention=cudnn knows no float32; give dtype=bfloat16 or attention=xla",
        ),
        (
            ["model.attention=splash", "model.position=alibi"],
            "model: attention=splash has no position=alibi; give attention=xla",
        ),
        (
            ["model.context_attention=ring", "model.position=alibi"],
            "model: context_attention=ring has no position=alibi; give gather",
        ),
        (
            ["model.rope_scaling={factor: 2}", "model.position=alibi"],
            "model: rope_scaling stretches rotary embeddings; leave it out with position=alibi",
        ),
        (["model.scan_unroll=3"], "model: scan_unroll=3 does not divide n_layers=2"),
        (["batch.microbatches=3"], "batch.microbatches=3 does not divide batch.rows=8"),
        (["mesh.data=-1", "mesh.fsdp=-1"], "mesh: axis sizes are positive, and at most one is -1"),
        (["mesh.tensor=0"], "mesh: axis sizes are positive, and at most one is -1"),
        (["data.prepared_dir=null"], "a pretrain recipe needs data.prepared_dir"),
        (
            ["data.template=chatml"],
            "data.template lays out conversations, which pretraining does not read: give it to sft",
        ),
        (["model=null"], "a pretrain recipe needs the sections model and tokenizer, or start.policy"),
        (["stage=sft"], "a sft recipe needs start.policy, the run folder it starts from"),
        (
            ["stage=ppo", "start.policy=runs/sft"],
            "a ppo recipe needs start.reward, the reward model's run folder",
        ),
        (["stage=dpo"], "a dpo recipe needs start.policy, the run folder it starts from"),
        (["lora.rank=4"], "lora needs start.policy, the run whose model it leaves as it is"),
        (
            [*SFT, "start.adapters=continue"],
            "start.adapters=continue needs the settings of the adapters, as lora.rank",
        ),
        (
            [*SFT, "lora.rank=4", "freeze.layers=1"],
            "lora and freeze: with adapters all of the model is frozen; leave freeze.layers and "
            "freeze.embeddings away",
        ),
        (
            [*SFT, "freeze={layers: 1, dtype: int8}"],
            "freeze.dtype=int8 is for what adapters are trained beside: give lora.rank",
        ),
        ([*SFT, "freeze.layers=0"], "freeze freezes nothing: give freeze.layers or freeze.embeddings=true"),
        (
            [*SFT, "freeze.layers=1", "mesh.stage=2"],
            "freeze.layers would leave stages of the pipeline idle: give mesh.stage=1",
        ),
        (
            [*SFT, "prefix.length=4", "mesh.context=2"],
            "prefix: keys that every token sees do not go around devices that split a text; give "
            "mesh.context=1",
        ),
        (
            [*SFT, "prompt.length=4", "mesh.offload=parameters"],
            "mesh.offload=parameters is for training a whole model without a pipeline; with prompt give "
            "mesh.offload=optimizer",
        ),
        (
            ["dpo.loss=ipo", "dpo.label_smoothing=0.1"],
            "dpo: loss=ipo has no label_smoothing; leave it at 0, or give loss=sigmoid",
        ),
        (
            [*PPO, "ppo.minibatches=3"],
            "ppo.minibatches=3 x batch.microbatches=1 does not divide batch.rows=8",
        ),
        (
            [*PPO, "ppo.minibatches=4", "batch.microbatches=4"],
            "ppo.minibatches=4 x batch.microbatches=4 does not divide batch.rows=8",
        ),
        (
            ["run.steps=3", "optimizer.warmup_steps=3"],
            "optimizer.warmup_steps=3 is not less than the run's 3 updates, so the peak learning rate is "
            "never reached",
        ),
        (
            ["model.rope_scaling={low_freq_factor: 4, high_freq_factor: 4}"],
            "model.rope_scaling: high_freq_factor must be greater than low_freq_factor",
        ),
    ],
)
def test_values_that_do_not_go_together(base, overrides, sentence):
    assert sentence_of(base, *overrides) == sentence


def test_a_missing_field_is_named(tmp_path):
    tree = {key: value for key, value in TREE.items() if key != "batch"}
    assert sentence_of(write(tmp_path / "a.yaml", tree)) == "batch is required and was not given"
    tree = TREE | {"run": {"dir": "x"}}
    assert (
        sentence_of(write(tmp_path / "b.yaml", tree))
        == "run: steps or epochs is required, and neither was given"
    )


@pytest.mark.parametrize("word", ["run.steps", "=3", "--run.steps 3"])
def test_a_word_that_is_no_override(base, word):
    assert sentence_of(base, word) == f"override {word!r} is not of the form section.field=value"


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text", "a: [1,", "\tstage: x"])
def test_a_file_that_is_no_recipe(tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    assert str(tmp_path / "a.yaml") in sentence_of(str(tmp_path / "a.yaml"))


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00stage")
    assert "is not valid YAML" in sentence_of(str(tmp_path / "a.yaml"))


def test_a_recipe_that_is_not_there():
    assert sentence_of("pretrain/nowhere").startswith("recipe 'pretrain/nowhere' not found")


# Overrides


def test_overrides_apply_in_order_and_have_yaml_types(base):
    config = recipe.load_recipe(
        base,
        [
            "optimizer.learning_rate=3e-4",
            "optimizer.eps=1.0e-5",
            "run.steps=7",
            "run.steps=9",
            'data.sources=["b.txt", "c.txt"]',
            "model.tie_embeddings=true",
            "model.head_dim=null",
            "run.dir=2024",
            "run.dir=runs/a=b",
            "model.rope_scaling.factor=4",
        ],
    )
    assert config.optimizer.learning_rate == 3e-4  # YAML 1.1 reads 3e-4 as text
    assert config.optimizer.eps == 1e-5
    assert config.run.steps == 9
    assert config.data.sources == ("b.txt", "c.txt")
    assert config.model.tie_embeddings is True and config.model.k_dim == 16
    assert config.run.dir == "runs/a=b"
    assert config.model.rope_scaling.factor == 4
    assert config.batch.rows == 8  # the rest is the file's


def test_a_section_given_as_a_mapping_merges(base):
    config = recipe.load_recipe(base, ["optimizer={learning_rate: 0.5, beta2: 0.99}", "optimizer.beta2=0.9"])
    assert (config.optimizer.learning_rate, config.optimizer.beta2, config.optimizer.beta1) == (0.5, 0.9, 0.9)


def test_a_config_is_immutable(base):
    config = recipe.load_recipe(base)
    with pytest.raises(ValidationError):
        config.run.steps = 5


def test_loading_does_not_change_the_tree():
    before = yaml.safe_dump(TREE)
    recipe.apply_overrides(TREE, ["run.steps=3", "optimizer.eps=1"])
    assert yaml.safe_dump(TREE) == before


# Includes


def test_one_include_level(tmp_path, base):
    """The including file wins, section by section; the path is relative to it."""
    (tmp_path / "below").mkdir()
    tree = {"include": "../base.yaml", "run": {"steps": 99}, "model": {"d_ff": 256}}
    config = recipe.load_recipe(write(tmp_path / "below" / "child.yaml", tree), ["run.seed=3"])
    assert (config.run.steps, config.run.dir, config.run.seed) == (99, "runs/x", 3)
    assert (config.model.d_ff, config.model.d_model) == (256, 64)


def test_two_include_levels_are_refused(tmp_path, base):
    write(tmp_path / "child.yaml", {"include": "base.yaml"})
    sentence = sentence_of(write(tmp_path / "grandchild.yaml", {"include": "child.yaml"}))
    assert "child.yaml is itself included by grandchild.yaml; one include level is the limit" in sentence


def test_an_include_that_is_not_there(tmp_path):
    sentence = sentence_of(write(tmp_path / "a.yaml", {"include": "gone.yaml"}))
    assert sentence == f"{tmp_path / 'gone.yaml'} does not exist"


# The resolved configuration


def test_dump_reads_back_equal(tmp_path, base):
    config = recipe.load_recipe(
        base, ["optimizer.learning_rate=3e-4", "model.rope_scaling={factor: 2}", "data.sources=['汉字.txt']"]
    )
    text = recipe.dump(config)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert recipe.load_recipe(str(tmp_path / "config.yaml")) == config
    assert "汉字.txt" in text and recipe.dump(recipe.load_recipe(str(tmp_path / "config.yaml"))) == text
    assert list(yaml.safe_load(text)) == list(Config.model_fields)  # complete, in the order of the class


# The fields


def fields(section: type[BaseModel], prefix: str = ""):
    for name, field in section.model_fields.items():
        below = section_in(field.annotation)
        yield f"{prefix}{name}", field, below
        if below is not None:
            yield from fields(below, f"{prefix}{name}.")


@pytest.mark.parametrize("stage", TRAINED)
def test_fewer_than_150_fields_that_a_stage_has_a_use_for(stage):
    """A section named after a stage is for that stage alone."""
    names = [name for name, _, below in fields(Config) if below is None]
    assert len([name for name in names if name.partition(".")[0] not in {*TRAINED} - {stage}]) < 150


def test_every_field_is_described():
    found = list(fields(Config))
    for name, field, _ in found:
        description = field.description or ""
        assert len(description) > 2 and not description[0].islower() and description.endswith("."), name
    assert [name for name, _, _ in found] == recipe.field_names(Config)


def test_every_section_is_frozen_and_closed():
    for name, _, below in fields(Config):
        if below is not None:
            assert below.model_config["frozen"] and below.model_config["extra"] == "forbid", name


# Our recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_recipe_loads(path):
    config = recipe.load_recipe(str(path))
    assert config.stage == path.parent.name
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#")
    assert "include:" in text or f"maxllm {config.stage} " in text  # its command stands at its head
    assert recipe.load_recipe(f"{path.parent.name}/{path.stem}") == config  # also by its short name


def test_there_are_recipes_for_every_stage():
    assert {path.parent.name for path in RECIPES} == {"pretrain", "sft", "reward", "dpo", "ppo"}


def test_head_width():
    assert ModelConfig.model_validate(MODEL).k_dim == 16
    assert ModelConfig.model_validate(MODEL | {"head_dim": 32}).k_dim == 32


# What a change of a field changes


def test_every_field_says_what_it_changes():
    effects = Config.effects()
    assert list(effects) == recipe.field_names(Config)
    assert effects["model.rope_scaling.factor"] is effects["model.d_model"] is Effect.MODEL
    assert effects["model.dtype"] is effects["optimizer.learning_rate"] is Effect.TRAINING
    assert (
        effects["model.remat"] is effects["mesh.fsdp"] is effects["batch.microbatches"] is Effect.COMPUTATION
    )
    assert effects["run.dir"] is effects["run.log_every"] is Effect.RECORD


def test_a_later_stage_says_how_its_inherited_model_computes(tmp_path):
    parent = recipe.load_recipe("pretrain/tiny_slice_cpu")
    (tmp_path / "config.yaml").write_text(recipe.dump(parent), encoding="utf-8")
    config = recipe.load_recipe("sft/tiny_tasks_cpu", [f"start.policy={tmp_path}", "model.remat=full"])
    assert config.model == parent.model.model_copy(update={"remat": "full"})


def test_a_model_that_only_says_how_to_compute_needs_the_run_that_has_the_rest(tmp_path):
    words = [f"start.policy={tmp_path / 'gone'}", "model.remat=full"]
    with pytest.raises(UserError, match=r"says remat and leaves the rest to .*gone, which is not there"):
        recipe.load_recipe("sft/tiny_tasks_cpu", words)
