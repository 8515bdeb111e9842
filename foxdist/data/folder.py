"""The folder that preparation leaves: shards in mosaicml-streaming's MDS format and `foxdist.json`.

It is written inside `NAME.unfinished` and moved out when it is whole, so a folder of the right name is never
half-written.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from foxdist.config import ConfigError

NAME = "foxdist.json"
HASH = "xxh64"  # of each shard, in index.json


class Prepared(BaseModel):
    """What stands in `foxdist.json`."""

    model_config = ConfigDict(frozen=True)

    sequence_length: int
    vocab: int
    end: int
    """Id of the end-of-text token."""
    tokenizer: str
    sequences: int
    documents: int
    tokens: int
    """Of documents, end-of-text tokens included, fill not."""
    settings: dict[str, Any]
    """What was asked for, and of which files; a second call with the same finds its work done."""


def unfinished(path: Path) -> Path:
    """Where preparation writes until it is done."""
    return path.with_name(path.name + ".unfinished")


def open_folder(path: Path) -> Prepared:
    """The description of a finished folder. Raises `ConfigError` if it is not there or not whole."""
    how = f"run: python -m foxdist.data prepare INPUT... --output {path}"
    if not path.is_dir() and unfinished(path).is_dir():
        raise ConfigError(
            f"data.path={path}: its preparation did not finish; must be complete; run the same prepare again"
        )
    if not path.is_dir():
        raise ConfigError(f"data.path={path}: no such folder; must be prepared data; {how}")
    if not (path / NAME).is_file():
        raise ConfigError(f"data.path={path}: holds no {NAME}; must be a folder that prepare wrote; {how}")
    try:
        found = Prepared.model_validate_json((path / NAME).read_text())
        shards = json.loads((path / "index.json").read_text())["shards"]
    except (ValidationError, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"data.path={path}: {NAME} or index.json is damaged ({error}); prepare again, elsewhere"
        ) from None
    for shard in shards:
        file, size = path / shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
        if not file.is_file() or file.stat().st_size != size:
            raise ConfigError(
                f"data.path={path}: shard {file.name} is missing or not {size} bytes long; must be as it was written; "
                "restore it, or delete the folder and prepare again"
            )
    return found


def fingerprint(path: Path, prepared: Prepared) -> str:
    """What identifies the data wherever it lies: a hash of its index, where the shards' own hashes stand, and of what
    its tokens mean."""
    meaning = f"{prepared.sequence_length} {prepared.vocab} {prepared.end} "
    return hashlib.blake2b(meaning.encode() + (path / "index.json").read_bytes(), digest_size=8).hexdigest()


def check_shard(path: Path, name: str, hashes: dict[str, str]) -> None:
    """Reads a whole shard against the hash that preparation wrote down. Raises `ConfigError` if it differs.

    hashes: those of `index.json` for it, by algorithm.
    """
    expected, algorithm = hashes.get(HASH), cast(Any, xxhash.xxh64)  # whose stubs hashlib's do not know
    try:
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        wrong = "" if found == expected else f"is not what was prepared ({HASH} {found}, not {expected})"
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    if wrong:
        raise ConfigError(
            f"data.path={path}: shard {name} {wrong}; must be as it was written; restore it from a copy, or prepare "
            "the same text again elsewhere and copy the shard; the same command then continues"
        )
