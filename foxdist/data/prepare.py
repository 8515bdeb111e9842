"""Files, folders or JSONL of text to MDS shards of token sequences."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TextIO

import numpy as np

from foxdist.data.folder import HASH, NAME, Prepared, unfinished
from foxdist.data.packing import Sequence, pack
from foxdist.data.streaming_import import import_streaming
from foxdist.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from foxdist.files import Held, hold
from foxdist.layout import BLOCK

LOCK = "lock"  # in the unfinished folder: whose it is, and that a preparation made it
TEXTS_AT_ONCE = 64  # what a tokenizer with threads gets in one call


@dataclass(frozen=True)
class Options:
    """One preparation, as asked for on the command line."""

    inputs: tuple[Path, ...]
    output: Path
    sequence_length: int
    tokenizer: str = "byte"
    train_bpe: int | None = None
    end: str | None = None
    text_key: str = "text"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_bytes: int = 0
    shard_mib: int = 64

    def settings(self, files: list[Path]) -> dict[str, object]:
        """What decides the content of the output, with the files found and their sizes for their contents.

        Equal to what an older version wrote, which lacks `include` and `min_bytes`, where those ask for nothing.
        """
        read = [*files, *(p for p in [Path(self.tokenizer)] if p.is_file())]
        listing = "\n".join(f"{path.resolve()} {path.stat().st_size}" for path in read)
        return {
            "inputs": [str(p.resolve()) for p in self.inputs],
            "sequence_length": self.sequence_length,
            "tokenizer": self.tokenizer,
            "train_bpe": self.train_bpe,
            "end": self.end,
            "text_key": self.text_key,
            "include": list(self.include) or None,
            "exclude": list(self.exclude),
            "min_bytes": self.min_bytes or None,
            "files": f"{len(files)} files, {hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()}",
        }


@dataclass
class Report:
    """What went in and what came out."""

    documents: int = 0
    tokens: int = 0
    sequences: int = 0
    skipped: list[Path] = field(default_factory=list)
    """Files that are not text."""
    short: int = 0
    """Documents left out for their length."""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """How often each token occurs."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each document."""
    text_of: Callable[[np.ndarray], str] = str
    """The tokenizer's decoder."""


Progress = Callable[[int], None]
"""Called with the number of bytes just read."""


def find_files(options: Options) -> list[Path]:
    """Every file of the inputs, folders searched in sorted order.

    Of a folder: files whose own name matches a pattern of `include`, if there is any. Left out is what has a hidden
    name, or one that matches a pattern of `exclude`, anywhere in its path in the folder.
    """
    files: list[Path] = []
    for path in options.inputs:
        if path.is_dir():
            hidden, include = (".*", *options.exclude), options.include or ("*",)
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                parts = file.relative_to(path).parts
                wanted = any(fnmatch(file.name, pattern) for pattern in include)
                if wanted and not any(fnmatch(part, pattern) for part in parts for pattern in hidden):
                    files.append(file)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"INPUT {path}: no such file or folder; must exist; correct the path")
    if not files:
        left = " that --include and --exclude leave" if options.include or options.exclude else ""
        raise ValueError(
            f"INPUT {' '.join(map(str, options.inputs))}: holds no file{left}; must hold text; name other inputs"
        )
    return files


def prepare(options: Options, progress: Progress = lambda size: None) -> tuple[Prepared, Report | None]:
    """Writes `options.output`; the report is None when the same preparation stood there, finished, already.

    Raises `ValueError` for every mistake in the options or the inputs. Nothing that another program wrote is deleted.
    """
    if options.sequence_length < 1 or options.sequence_length % BLOCK:
        raise ValueError(
            f"--sequence-length {options.sequence_length}: not a whole number of blocks; must be a multiple of "
            f"{BLOCK}; use {max(1, round(options.sequence_length / BLOCK)) * BLOCK}"
        )
    files = find_files(options)
    settings = options.settings(files)
    done = _finished(options.output, settings)
    if done:
        return done, None
    tokenizer = _tokenizer(options, files)
    work, lock = _start_anew(options.output)
    try:
        prepared, report = _fill(work / "data", options, files, settings, tokenizer, progress)
        (work / "data").replace(options.output)
        shutil.rmtree(work)  # still locked: another preparation could be in it otherwise
    except ValueError:  # a mistake in the inputs; after a kill the folder stays and is recognised
        shutil.rmtree(work)
        raise
    finally:
        lock.close()
    return prepared, report


def _fill(
    folder: Path,
    options: Options,
    files: list[Path],
    settings: dict[str, object],
    tokenizer: Tokenizer,
    progress: Progress,
) -> tuple[Prepared, Report]:
    report = Report(histogram=np.zeros(tokenizer.vocab, np.int64), text_of=tokenizer.decode)
    documents = _documents(_texts(files, options, report, progress), tokenizer, report)
    _write(folder, options, tokenizer, documents, report)
    if not report.tokens:
        left_out = {
            "files are not UTF-8 text": len(report.skipped),
            f"documents are shorter than --min-bytes {options.min_bytes}": report.short,
        }
        why = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
        raise ValueError(
            f"INPUT {' '.join(map(str, options.inputs))}: holds no text{f' ({why})' if why else ''}; must hold some; "
            "name other inputs"
        )
    prepared = Prepared(
        sequence_length=options.sequence_length,
        vocab=tokenizer.vocab,
        end=tokenizer.end,
        tokenizer=tokenizer.name,
        sequences=report.sequences,
        documents=report.documents,
        tokens=report.tokens,
        settings=settings,
    )
    if tokenizer.definition:
        (folder / "tokenizer.json").write_text(tokenizer.definition)
    (folder / NAME).write_text(prepared.model_dump_json(indent=1))
    return prepared, report


def _start_anew(output: Path) -> tuple[Path, TextIO]:
    """A folder to write into, this process's own as long as the file is open, with nothing of an earlier call in it."""
    work = unfinished(output)
    if work.is_file() or (work.is_dir() and any(work.iterdir()) and not (work / LOCK).is_file()):
        raise ValueError(
            f"--output {output}: {work} is in the way, and no preparation made it; must be free to write into; move it "
            "or choose another --output"
        )
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold(work / LOCK)
    except Held as other:
        raise ValueError(
            f"--output {output}: {other} is writing it; must be one preparation at a time; wait for it or choose "
            "another --output"
        ) from None
    if (work / "data").exists():
        shutil.rmtree(work / "data")
    return work, lock


def _finished(output: Path, settings: dict[str, object]) -> Prepared | None:
    """What stands in the output folder if it is this very preparation. Raises `ValueError` if it is anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / NAME).is_file():
        raise ValueError(f"--output {output}: holds other files; must be new or empty; choose another folder")
    found = Prepared.model_validate_json((output / NAME).read_text())
    changed = [k for k, v in settings.items() if found.settings.get(k) != v]
    if changed:
        raise ValueError(
            f"--output {output}: holds data of another preparation (it differs in {', '.join(changed)}); finished data "
            "is not overwritten; choose another --output or delete that folder"
        )
    return found


def _tokenizer(options: Options, files: list[Path]) -> Tokenizer:
    if options.train_bpe is not None:
        return train_bpe(_texts(files, options, Report(), lambda size: None), options.train_bpe)
    if options.tokenizer == "byte":
        return byte_tokenizer()
    return load_tokenizer(Path(options.tokenizer), options.end)


def _texts(files: list[Path], options: Options, report: Report, progress: Progress) -> Iterator[str]:
    """Each document's text, those left out that are shorter than `min_bytes`; the report counts them."""
    for text in _all_texts(files, options.text_key, report, progress):
        if len(text.encode()) < options.min_bytes:
            report.short += 1
        else:
            yield text


def _all_texts(files: list[Path], key: str, report: Report, progress: Progress) -> Iterator[str]:
    """Each document's text. Files that are not UTF-8 text are skipped and reported."""
    for path in files:
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    progress(len(line))
                    if line.strip():
                        yield _field(line, key, path, number)
            continue
        data = path.read_bytes()
        progress(len(data))
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            report.skipped.append(path)
        elif text:
            yield text


def _field(line: bytes, key: str, path: Path, number: int) -> str:
    where = f"INPUT {path}:{number}"
    try:
        value = json.loads(line)
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{where}: not a JSON line; {error}; must be one object a line; correct the file") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        keys = ", ".join(value) if isinstance(value, dict) else f"no keys but a {type(value).__name__}"
        raise ValueError(f"{where}: no text under {key!r}; must be an object with one; it has {keys}; name --text-key")
    text: str = value[key]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {error}; must be valid Unicode; correct the file") from None
    return text


def _documents(texts: Iterator[str], tokenizer: Tokenizer, report: Report) -> Iterator[np.ndarray]:
    """Each document's ids, its end-of-text token last."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == TEXTS_AT_ONCE:
            yield from _encode(batch, tokenizer, report)
            batch = []
    yield from _encode(batch, tokenizer, report)


def _encode(texts: list[str], tokenizer: Tokenizer, report: Report) -> Iterator[np.ndarray]:
    for ids in tokenizer.encode(texts):
        document = np.append(ids, tokenizer.end)
        report.documents += 1
        report.tokens += len(document)
        report.lengths.append(len(document))
        report.histogram += np.bincount(document, minlength=tokenizer.vocab)
        yield document


def _write(
    folder: Path, options: Options, tokenizer: Tokenizer, documents: Iterator[np.ndarray], report: Report
) -> None:
    streaming = import_streaming()
    length, dtype = options.sequence_length, "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    columns = {"tokens": f"ndarray:{dtype}:{length}", "starts": "ndarray:int32", "used": "int"}
    with streaming.MDSWriter(
        out=str(folder), columns=columns, size_limit=options.shard_mib * 2**20, hashes=[HASH]
    ) as writer:
        for sequence in pack(documents, length):
            writer.write(_sample(sequence, length, tokenizer.end, dtype))
            report.sequences += 1


def _sample(sequence: Sequence, length: int, fill: int, dtype: str) -> dict[str, object]:
    return {
        "tokens": sequence.tokens(length, fill).astype(dtype),
        "starts": sequence.starts,
        "used": sequence.used,
    }
