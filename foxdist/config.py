"""The configuration: one frozen model a section, YAML in, `section.key=value` over it, errors before the first step.

Knows nothing of torch.distributed, DeepSpeed or the data on disk. Rules that need the number of ranks are in
`check_world`; rules that need the prepared data are checked where the data is opened.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from foxdist.layout import BLOCK, chunk_count


class ConfigError(ValueError):
    """A mistake in the configuration: `section.field=value: what is wrong; what is required; what to change`."""


def _whole(value: Any) -> Any:
    """A count as people write it: YAML reads 1e9 as text."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Decay = Annotated[float, Field(ge=0, lt=1)]


class Model(Section):
    kind: Literal["pro", "llama"] = "pro"
    """`llama`: attention, forget gate, SwiGLU. `pro` adds K/V shift, QK-norm, output norm and output gate."""
    hidden: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int | None = Field(None, gt=0)
    """K/V heads; each is shared by heads / kv_heads query heads. Default: as many as heads."""
    vocab: int = Field(gt=1)
    mlp_ratio: float | None = Field(None, gt=0)
    """Width of the MLP: 2/3 of hidden x ratio, rounded up to 256. Default: 3.5 for pro, 4 for llama."""
    rope: bool = False
    """Rotary position embedding on top of the forget gate. The published models have none."""
    rope_base: float = Field(500_000.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)
    qk_norm_eps: float = Field(1e-5, gt=0)
    init_std: float = Field(0.02, gt=0)
    backend: Literal["auto", "gluon", "triton", "torch"] = "auto"
    """Tile implementation of attention; auto is the fastest that applies."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def groups(self) -> int:
        """K/V heads, with the default filled in."""
        return self.kv_heads or self.heads

    @property
    def mlp_width(self) -> int:
        ratio = self.mlp_ratio or (3.5 if self.kind == "pro" else 4.0)
        return 256 * -(-int(self.hidden * ratio * 2 / 3) // 256)


class Data(Section):
    path: Path
    """A folder that `python -m foxdist.data prepare` wrote."""
    sequence_length: int = Field(gt=0)
    """Tokens in a sequence, the one the data was prepared with."""
    shuffle: bool = True
    workers: int = Field(1, ge=0)
    """Loader processes for each rank; 0 loads in the training process."""


class Parallel(Section):
    cp: int = Field(1, gt=0)
    """Ranks that share one sequence. The rest of the world is data parallel."""
    zero: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage, over all dp x cp ranks."""
    layout: Literal["auto", "zigzag", "contiguous"] = "zigzag"
    """Which chunks a rank owns: `zigzag` balances the work of global heads, `contiguous` sends fewer bytes. `auto`
    picks one at the start, by the tokens a rank and whether ranks share a host (attention/predict.py)."""
    schedule: Literal["auto", "gather", "ring"] = "auto"
    """How kept blocks travel: all at once, or in stages that bound memory."""
    transport: Literal["auto", "nccl", "peer"] = "auto"
    """What carries them: `nccl` messages (on CPUs gloo's), `peer` each other's memory, on one host. `auto` takes `peer`
    on GPUs that can."""
    overlap: bool = True
    """False waits for every message where it is posted, for debugging. The results are the same bits."""
    timeout_minutes: float = Field(10.0, gt=0)
    """A rank that waits for others longer than this, or stays at one place of a step, ends the job (watch.py)."""
    hang_factor: float = Field(10.0, ge=0)
    """A step of so many times the median of the last ones ends the job, once it has taken two minutes. 0: never."""
    checksum_every: int = Field(100, ge=0)
    """Steps between comparisons of the ranks' plans. A difference ends the run before the update. 0: never."""


class AcpSection(Section):
    enabled: bool = True
    log_eps: float = Field(-10.0, lt=0)
    """Natural log of the attention weight that any query may lose."""
    bound: Literal["paper", "tight"] = "paper"
    """The rule that proves it: as published, or from q and k themselves, which prunes more (attention/tight.py)."""
    certify_every: int = Field(500, ge=0)
    """Steps between certificates: the weight really pruned from sampled queries, measured densely. More than
    exp(log_eps) ends the run. 0: never."""
    dry_run: bool = False
    """Plan and count, prune nothing: metrics show what would be kept and needed; all is computed and sent."""


class Optim(Section):
    lr: float = Field(gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """For weight matrices and the embedding; biases and norm weights are not decayed."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_tokens: Annotated[int, BeforeValidator(_whole), Field(ge=0)] = 0
    """The learning rate rises linearly from 0 over so many tokens."""
    min_lr: float = Field(0.0, ge=0)
    """Where the cosine ends."""
    clip: float = Field(1.0, gt=0)
    """Largest global norm of the gradient."""


class Train(Section):
    run_dir: Path
    """Everything a run writes. The same command continues what lies there."""
    micro_batch: int = Field(1, gt=0)
    """Sequences that go through the model at once, on each group of cp ranks."""
    tokens_per_step: Count
    steps: Count | None = None
    tokens: Count | None = None
    """Length of the run, in steps or in tokens."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: parameters, activations and gradients; gates, norms, loss and optimizer state stay fp32."""
    seed: int = Field(0, ge=0, lt=2**32)
    activation_checkpointing: bool = False
    """Recompute each block in backward; attention outputs and plans are kept, not computed or sent again."""
    activation_offloading: bool = False
    """What activation checkpointing keeps waits in the host's memory, but for two blocks' (offload.py)."""
    compile: bool = False
    """Compile the blocks with torch.compile: a minute or more at the start, then fewer kernels."""


class Checkpoint(Section):
    every: int = Field(1000, gt=0)
    """Steps between checkpoints; one is also saved at the end."""
    keep: int = Field(2, gt=0)
    """How many of the newest are kept. At least 2 survive a torn one."""


class MetricsSection(Section):
    every: int = Field(10, gt=0)
    """Steps between logged steps."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "foxdist"
    name: str | None = None
    """W&B's name of the run. Default: the name of the run folder."""


class Config(Section):
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    acp: AcpSection = AcpSection()
    optim: Optim
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    metrics: MetricsSection = MetricsSection()

    @model_validator(mode="after")
    def _cross_checks(self) -> "Config":
        _check_model(self.model)
        _check_sequence(self)
        _check_length(self)
        _check_offloading(self.train)
        _check_hang_factor(self.parallel.hang_factor)
        return self

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, a whole number of steps."""
        return self.total_steps * self.train.tokens_per_step

    @property
    def total_steps(self) -> int:
        return self.train.steps or -(-(self.train.tokens or 0) // self.train.tokens_per_step)


def load(path: Path | str, overrides: list[str] | None = None) -> Config:
    """The configuration of a YAML file with `section.key=value` overrides. Raises `ConfigError`."""
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none beside it"
        raise ConfigError(f"--config {path}: no such file; must be a YAML file; there are: {near}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid YAML; {error}; correct the file") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {path}: holds {'nothing' if tree is None else type(tree).__name__}; must hold sections such as "
            "model, data, train; see configs/quickstart.yaml"
        )
    tree = {name: {} if section is None else section for name, section in tree.items()}  # `parallel:` and no more
    for text in overrides or []:
        _override(tree, text)
    return parse(tree)


def parse(tree: dict[str, Any]) -> Config:
    """The configuration of a tree of sections. Raises `ConfigError` naming every mistake."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_message(tree, e) for e in error.errors())) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def leaves(config: Config) -> dict[str, Any]:
    """Each key's value under `section.key`, in the types of JSON."""
    sections = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def check_world(config: Config, world: int) -> tuple[int, int]:
    """(dp, gradient accumulation) on `world` ranks. Raises `ConfigError` where they do not fit."""
    cp, train = config.parallel.cp, config.train
    if world % cp:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise ConfigError(
            f"parallel.cp={cp}: does not divide the {world} ranks of this job; must be one of {fits}; "
            "change parallel.cp or start another number of ranks"
        )
    dp = world // cp
    once = config.data.sequence_length * train.micro_batch * dp
    if train.tokens_per_step % once:
        raise ConfigError(
            f"train.tokens_per_step={train.tokens_per_step}: does not divide into micro-batches; must be a multiple of "
            f"{once} ({config.data.sequence_length} tokens x train.micro_batch={train.micro_batch} x dp={dp}); "
            f"use {max(1, round(train.tokens_per_step / once)) * once}, or change train.micro_batch or the ranks"
        )
    return dp, train.tokens_per_step // once


def _check_model(model: Model) -> None:
    if model.hidden % model.heads:
        raise ConfigError(
            f"model.heads={model.heads}: does not divide model.hidden={model.hidden}; hidden must be heads x head_dim; "
            f"use {_nearest_divisor(model.hidden, model.heads)} heads"
        )
    if model.heads % model.groups:
        raise ConfigError(
            f"model.kv_heads={model.kv_heads}: does not divide model.heads={model.heads}; every K/V head must serve "
            f"the same number of query heads; use {_nearest_divisor(model.heads, model.groups)}"
        )
    if model.rope and model.head_dim % 2:
        raise ConfigError(
            f"model.rope=true: turns pairs of dimensions, and head_dim is {model.head_dim}; must be even; change "
            "model.heads or set model.rope=false"
        )


def _check_sequence(config: Config) -> None:
    length, cp, layout = config.data.sequence_length, config.parallel.cp, config.parallel.layout
    # Either layout must fit what `auto` may pick: zigzag's chunks are halves of contiguous ones.
    unit = BLOCK * chunk_count(cp, "zigzag" if layout == "auto" else layout) if cp > 1 else BLOCK
    if length % unit:
        near = sorted({max(1, length // unit) * unit, -(-length // unit) * unit})
        raise ConfigError(
            f"data.sequence_length={length}: not a whole number of blocks for every chunk; must be a "
            f"multiple of {unit} ({BLOCK}-token blocks x {unit // BLOCK} chunks of parallel.layout={layout} with "
            f"parallel.cp={cp}); use {' or '.join(map(str, near))}"
        )


def _check_length(config: Config) -> None:
    train, optim = config.train, config.optim
    if (train.steps is None) == (train.tokens is None):
        raise ConfigError(
            f"train.steps={train.steps}, train.tokens={train.tokens}: exactly one of them says how long to train; "
            "set one and leave the other out (or null)"
        )
    if optim.warmup_tokens > config.total_tokens:
        raise ConfigError(
            f"optim.warmup_tokens={optim.warmup_tokens}: longer than the run; must be at most "
            f"{config.total_tokens} tokens ({config.total_steps} steps); shorten it or train longer"
        )
    if optim.min_lr > optim.lr:
        raise ConfigError(f"optim.min_lr={optim.min_lr}: above optim.lr={optim.lr}; must be at most that; lower it")


def _check_offloading(train: Train) -> None:
    if train.activation_offloading and not train.activation_checkpointing:
        raise ConfigError(
            "train.activation_offloading=true: without activation checkpointing a block keeps more than can go to the "
            "host while another runs; must go with train.activation_checkpointing=true; set it, too"
        )


def _check_hang_factor(factor: float) -> None:
    if 0 < factor < 2:
        raise ConfigError(
            f"parallel.hang_factor={factor:g}: would end the job at a step like others; must be 0 (never) or at least "
            "2; raise it"
        )


def _nearest_divisor(number: int, wish: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wish))


def _override(tree: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and section and dot and key):
        raise ConfigError(f"{text}: not an override; must be section.key=value; for example train.steps=100")
    if not isinstance(tree.get(section, {}), dict):
        raise ConfigError(f"{section}: is not a section in the file; must hold keys; correct the file")
    try:
        tree.setdefault(section, {})[key] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{text}: the value is not valid YAML; must be a YAML value; quote it: '\"...\"'") from None


def _message(tree: dict[str, Any], error: Any) -> str:
    """One of pydantic's errors in our words."""
    where = [str(x) for x in error["loc"]]
    name = ".".join(where)
    if error["type"] == "value_error" and not where:
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        known = list(Config.model_fields)
        if len(where) > 1:
            known = list(Config.model_fields[where[0]].annotation.model_fields)  # type: ignore[union-attr]
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*where[:-1], near[0]])}?" if near else f"known are {', '.join(known)}"
        return f"{name}: unknown key; must be one of the documented ones; {hint}"
    if error["type"] == "missing":
        how = f"add it to the file or pass {name}=VALUE" if len(where) > 1 else "see configs/quickstart.yaml"
        return f"{name}: missing; must be set; {how}"
    requirement = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if error["type"] == "path_type":
        requirement = "a path"
    if error["type"] == "tuple_type":
        requirement = "a list, such as [0.9, 0.95]"
    if isinstance(error["input"], bool):
        requirement += " (YAML reads on, off, yes and no as true and false)"
    if error["type"] in ("model_type", "model_attributes_type"):
        requirement = "a section that holds keys"
    return f"{name}={error['input']}: not allowed; must be {requirement}; correct the value"
