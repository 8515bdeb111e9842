"""Where finished metrics go: the console, `metrics.jsonl`, W&B. Chosen at start; a sink that is off is not there.

At the start a sink that cannot be had is an error. Later one that fails is said, and neither training nor another sink
ends with it.
"""

import json
import netrc
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foxdist.config import Config, ConfigError
from foxdist.files import replace_text
from foxdist.log import log

Sink = Callable[[int, dict[str, Any]], None]
"""Takes a step and its metrics."""


def check_wandb(config: Config) -> None:
    """Raises `ConfigError` if W&B is to be online and nobody is logged in, before anything starts."""
    if config.metrics.wandb != "online":
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    stored = file.is_file() and netrc.netrc(file).authenticators(host)
    if not (stored or os.environ.get("WANDB_API_KEY")):
        raise ConfigError(
            "metrics.wandb=online: no W&B API key found; must be in WANDB_API_KEY or ~/.netrc; run `wandb login`, or "
            "set metrics.wandb=offline and upload later with `wandb sync`"
        )


class Sinks:
    """All sinks of a run, on rank 0. `first_step`: the step after which this process continues."""

    def __init__(self, config: Config, first_step: int):
        self._progress = _console(config, first_step)
        self._file = _open_jsonl(config.train.run_dir / "metrics.jsonl", first_step)
        self._wandb = None if config.metrics.wandb == "disabled" else _start_wandb(config)
        self._total = config.total_steps
        self._unwritten = b""
        self._failing: set[str] = set()

    def __call__(self, step: int, values: dict[str, Any]) -> None:
        self._unwritten += json.dumps({"step": step, **values}).encode() + b"\n"
        self._try("metrics.jsonl", self._write)
        self._tell_wandb(lambda wandb: wandb.log(_flat(values), step=step))
        self._try("the console", lambda: self._show(step, values))

    def close(self, ended: str) -> None:
        """ended: `done`, why the run stopped early, or nothing after an error. W&B shows it as finished, preempted or
        failed: it knows a preempted run by a status other than 0."""
        if self._progress is not None:
            self._try("the console", self._progress.stop)
        self._try("metrics.jsonl", self._write)
        self._try("the end of metrics.jsonl", self._file.close)
        if self._unwritten:
            log.error("metrics.jsonl: %d rows never found room and are lost", self._unwritten.count(b"\n"))
        if ended not in ("", "done"):
            self._tell_wandb(lambda wandb: wandb.mark_preempting())
        self._tell_wandb(lambda wandb: wandb.finish(exit_code=0 if ended == "done" else 1))

    def _write(self) -> None:
        """Without a buffer: what a full disk did not take, be it half a line, is written as soon as there is room."""
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _show(self, step: int, values: dict[str, Any]) -> None:
        if self._progress is None:
            print(_line(step, self._total, values), flush=True)
        else:
            self._progress.update(self._progress.task_ids[0], completed=step, description=_short(values))

    def _try(self, name: str, tell: Callable[[], object]) -> None:
        """Tells a sink something. That it fails is said once, and that it works again."""
        try:
            tell()
        except OSError as error:
            if name not in self._failing:
                log.error("%s: cannot be written (%s); TRAINING GOES ON, and tries again", name, error)
            self._failing.add(name)
        else:
            if name in self._failing:
                log.warning("%s: written again", name)
            self._failing.discard(name)

    def _tell_wandb(self, tell: Callable[[Any], object]) -> None:
        """W&B's own process hears a signal to the whole job, too, and ends at SIGTERM at once: that must cost neither
        the step in flight nor its checkpoint."""
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:  # its own and those of its connection; what it was told is in metrics.jsonl
            log.warning(
                "W&B is gone (%s: %s); metrics.jsonl goes on, W&B at the next start", type(error).__name__, error
            )
            self._wandb = None


def _console(config: Config, first_step: int) -> Progress | None:
    """A progress bar on a terminal; None elsewhere, where each logged step prints a line."""
    if not sys.stdout.isatty():
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns)
    progress.add_task("starting", total=config.total_steps, completed=first_step)
    progress.start()
    return progress


def _line(step: int, total: int, values: dict[str, Any]) -> str:
    left = (total - step) * values["time/step(ms)"] / 1000
    return (
        f"step {step}/{total}  {_short(values)}  lr {values['lr']:.2e}  grad {values['grad_norm']:.3f}  "
        f"eta {int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
    )


def _short(values: dict[str, Any]) -> str:
    text = f"loss {values['loss']:.4f}  {values['tokens/s']:,.0f} tokens/s  tiles {values['acp/tiles_kept(%)']:.1f}%"
    if values["comm/kv_dense(MiB)"]:
        text += f"  K/V sent {100 * values['comm/kv_sent(MiB)'] / values['comm/kv_dense(MiB)']:.1f}% of dense"
    return text


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The logged steps in a file; none if it is not there. What a kill left half-written is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _open_jsonl(path: Path, first_step: int) -> Any:
    """The file, without lines of steps after the checkpoint that the run continues from."""
    rows = read_jsonl(path)
    if rows and not first_step:
        old = path.with_name("metrics.old.jsonl")
        path.replace(old)
        log.warning("no checkpoint in %s: starting from step 0; what was logged is now %s", path.parent, old.name)
    elif path.exists():
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= first_step))
    return path.open("ab", buffering=0)


def _start_wandb(config: Config) -> Any:
    """The run's one W&B run, the same after every restart: its id stands in the run folder."""
    import wandb

    metrics, folder = config.metrics, config.train.run_dir
    name = folder / "wandb_id"
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:8])
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        return wandb.init(
            project=metrics.project,
            name=metrics.name or folder.name,
            id=name.read_text(),
            resume="allow" if metrics.wandb == "online" else None,  # offline, runs of one id join when they are synced
            mode=metrics.wandb,
            dir=folder,
            config=config.model_dump(mode="json"),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"metrics.wandb={metrics.wandb}: W&B did not start ({error}); must be reachable, with a valid key; run "
            "`wandb login`, or set metrics.wandb=offline and upload later with `wandb sync`"
        ) from None


def _flat(values: dict[str, Any]) -> dict[str, float]:
    """Lists spread over names: `x_by_head(u)` becomes `x_by_head(u)/layer03/head05`, `x_by_layer(u)` `.../layer03` and
    `x_by_rank(u)` `.../rank2`."""
    flat = {}
    for name, value in values.items():
        if not isinstance(value, list):
            flat[name] = value
        elif value and isinstance(value[0], list):
            flat |= {f"{name}/layer{i:02d}/head{j:02d}": v for i, row in enumerate(value) for j, v in enumerate(row)}
        elif "_by_layer" in name:
            flat |= {f"{name}/layer{i:02d}": v for i, v in enumerate(value)}
        else:
            flat |= {f"{name}/rank{i}": v for i, v in enumerate(value)}
    return flat
