"""Configuration: what is read, what is refused, and in which words."""

from pathlib import Path

import pytest
import yaml

from foxdist.config import Config, ConfigError, check_world, dump, load, parse
from foxdist.optim import learning_rate

from runs import tree

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def made(**changes):
    return parse(tree("data", "run", **changes))


def test_round_trip(tmp_path):
    config = made(parallel__cp=2, model__kv_heads=1)
    path = tmp_path / "c.yaml"
    path.write_text(dump(config))
    assert load(path) == config


def test_overrides_win(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree("data", "run")))
    config = load(path, ["train.steps=7", "optim.lr=1e-4", "acp.enabled=false", "model.kv_heads=1"])
    assert (config.train.steps, config.optim.lr, config.acp.enabled, config.model.kv_heads) == (7, 1e-4, False, 1)
    switched = load(path, ["train.steps=", "train.tokens=20480"])
    assert (switched.train.steps, switched.total_steps) == (None, 10)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_sound(path):
    config = load(path)
    dp, accumulation = check_world(config, 2 if path.stem == "quickstart" else 8)
    assert dp >= 1
    assert accumulation >= 1
    assert path.read_text().startswith("# "), "a configuration opens with what it is for"


def test_the_published_recipes_are_there():
    """facts of the published runs, size by size: (hidden, layers, lr, tokens)."""
    sizes = {c.stem: load(c) for c in CONFIGS}
    for name, hidden, layers, rate, tokens in (
        ("fox_pro_125m", 768, 12, 2e-3, 2_684_354_560),
        ("fox_pro_360m", 1024, 24, 2e-3, 7_516_192_768),
        ("fox_pro_760m", 1536, 24, 1e-3, 16_106_127_360),
        ("fox_llama_125m", 768, 12, 2e-3, 2_684_354_560),
    ):
        c = sizes[name]
        assert (c.model.hidden, c.model.layers, c.optim.lr, c.total_tokens) == (hidden, layers, rate, tokens)
        assert (c.train.tokens_per_step, c.data.sequence_length, c.model.vocab) == (524_288, 16_384, 50_257)
        assert (c.optim.betas, c.optim.weight_decay, c.optim.clip) == ((0.9, 0.95), 0.1, 1.0)
        assert c.optim.warmup_tokens == 268_435_456


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__run_dirr": "x"}, ["train.run_dirr: unknown key", "did you mean train.run_dir?"]),
        ({"parallel__nothing_like_it": 1}, ["parallel.nothing_like_it: unknown key", "known are", "layout"]),
        ({"model__kind": "gpt"}, ["model.kind=gpt", "'pro' or 'llama'"]),
        ({"parallel__zero": 0}, ["parallel.zero=0", "1, 2 or 3"]),
        ({"parallel__layout": "striped"}, ["parallel.layout=striped"]),
        ({"model__heads": 5}, ["model.heads=5", "hidden=32", "use 4 heads"]),
        ({"model__kv_heads": 3}, ["model.kv_heads=3", "heads=2"]),
        ({"model__heads": 32, "model__rope": True}, ["model.rope=true", "head_dim is 1"]),
        ({"parallel__hang_factor": 1}, ["parallel.hang_factor=1", "0 (never) or at least 2"]),
        ({"data__sequence_length": 1000}, ["data.sequence_length=1000", "multiple of 128", "896 or 1024"]),
        (
            {"data__sequence_length": 1920, "parallel__cp": 2},
            ["data.sequence_length=1920", "multiple of 512", "4 chunks", "1536 or 2048"],
        ),
        (
            {"data__sequence_length": 1280, "parallel__cp": 2, "parallel__layout": "auto"},
            ["data.sequence_length=1280", "multiple of 512", "parallel.layout=auto", "1024 or 1536"],
        ),
        ({"train__steps": None}, ["train.steps=None, train.tokens=None", "exactly one"]),
        ({"train__tokens": 10}, ["train.steps=20, train.tokens=10", "exactly one"]),
        ({"optim__warmup_tokens": 10**9}, ["optim.warmup_tokens=1000000000", "at most 40960"]),
        ({"optim__min_lr": 1.0}, ["optim.min_lr=1.0", "above optim.lr"]),
        ({"optim__lr": -1}, ["optim.lr=-1", "greater than 0"]),
        ({"optim__lr": float("inf")}, ["optim.lr=inf", "finite"]),
        ({"optim__betas": (0.9, 1.5)}, ["optim.betas.1=1.5", "less than 1"]),
        ({"train__seed": -1}, ["train.seed=-1", "greater than or equal to 0"]),
        ({"train__run_dir": None}, ["train.run_dir=None", "must be a path"]),
        ({"metrics__wandb": "cloud"}, ["metrics.wandb=cloud"]),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(ConfigError) as caught:
        made(**changes)
    for word in words:
        assert word in str(caught.value)


def test_unknown_and_missing_sections_are_named():
    values = tree("data", "run")
    values["optimizer"] = values.pop("optim")
    with pytest.raises(ConfigError) as caught:
        parse(values)
    assert "optimizer: unknown key" in str(caught.value)
    assert "did you mean optim?" in str(caught.value)
    assert "optim: missing" in str(caught.value)


@pytest.mark.parametrize(
    "overrides, word",
    [
        (["steps=3"], "must be section.key=value"),
        (["train.steps"], "must be section.key=value"),
        (["train.x=1"], "train.x"),
        (["metrics.name=@home"], "metrics.name=@home: the value is not valid YAML"),
        (["metrics.name=[x"], "not valid YAML"),
        (["data.path="], "data.path=None: not allowed; must be a path"),
        (["model=pro"], "must be section.key=value"),
        ([".steps=5"], "must be section.key=value"),
        (["optim.betas=0.9"], r"must be a list, such as \[0.9, 0.95\]"),
        (["metrics.wandb=off"], "YAML reads on, off, yes and no as true and false"),
        (["train.tokens_per_step=1.5"], "train.tokens_per_step=1.5"),
    ],
)
def test_bad_overrides_are_named(tmp_path, overrides, word):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree("data", "run")))
    with pytest.raises(ConfigError, match=word):
        load(path, overrides)


def test_missing_or_broken_files_are_named(tmp_path):
    (tmp_path / "there.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"no such file.*there\.yaml"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path / "there.yaml")
    for content, word in [("", "holds nothing"), ("[1]", "holds list"), ("pro", "holds str")]:
        (tmp_path / "there.yaml").write_text(content)
        with pytest.raises(ConfigError, match=f"{word}; must hold sections"):
            load(tmp_path / "there.yaml", ["train.steps=3"])
    with pytest.raises(ConfigError, match="model=5: not allowed; must be a section that holds keys"):
        parse(tree("data", "run") | {"model": 5})


def test_counts_and_empty_sections_as_people_write_them(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree("data", "run")) + "acp:\n")
    config = load(path, ["train.tokens=1e6", "train.steps=", "optim.warmup_tokens=2.5e5"])
    assert (config.train.tokens, config.train.steps, config.optim.warmup_tokens) == (1_000_000, None, 250_000)
    assert config.acp.enabled


def test_world_arithmetic():
    config = made(parallel__cp=2, train__tokens_per_step=8192, train__micro_batch=2)
    assert check_world(config, 2) == (1, 8)
    assert check_world(config, 8) == (4, 2)
    with pytest.raises(ConfigError, match=r"parallel\.cp=2: does not divide the 3 ranks"):
        check_world(config, 3)
    with pytest.raises(ConfigError, match=r"train\.tokens_per_step=8192.*multiple of 3072.*use 9216"):
        check_world(config, 6)


def test_learning_rate():
    """10 steps of 100 tokens: up over 300 tokens, then half a cosine to min_lr, or flat."""
    values = tree("data", "run", train__tokens_per_step=512, train__steps=10, optim__lr=1.0, optim__warmup_tokens=1024)
    values["optim"]["min_lr"] = 0.1
    config = parse(values)
    assert [learning_rate(config, t) for t in (0, 512, 1024)] == [0, 0.5, 1.0]
    assert learning_rate(config, 1024 + 2048) == pytest.approx(0.55)
    assert learning_rate(config, 5120) == pytest.approx(0.1)
    constant = Config.model_validate(values | {"optim": values["optim"] | {"schedule": "constant"}})
    assert learning_rate(constant, 5120) == 1.0
