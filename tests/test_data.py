"""From text to batches: nothing lost, nothing doubled, the same order whatever the ranks, exact after a restart."""

import itertools
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxdist.data.__main__ import main
from foxdist.data.folder import open_folder, unfinished
from foxdist.data.loader import Loader, next_of_all, shifted
from foxdist.data.packing import pack
from foxdist.data.prepare import Options, prepare
from foxdist.data.streaming_import import import_streaming
from foxdist.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from foxdist.loss import IGNORE
from foxdist.progress import Place, progress
from foxdist.verdict import SILENT, word_at

from runs import by_step, read, write_data, write_texts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 100))
def test_packing_keeps_every_token_once(lengths, length):
    documents = [np.full(n, i) for i, n in enumerate(lengths)]
    sequences = list(pack(documents, length))
    assert all(0 < s.used <= length for s in sequences)
    assert all(len(s.tokens(length, -1)) == length for s in sequences)
    packed = np.concatenate([np.concatenate(s.pieces) for s in sequences]) if sequences else np.array([], int)
    assert np.array_equal(np.bincount(packed, minlength=len(lengths)), lengths)
    # A document that fits is in one piece.
    pieces = [int(p[0]) for s in sequences for p in s.pieces]
    assert all(pieces.count(i) == -(-n // length) for i, n in enumerate(lengths))


def test_packing_wastes_little():
    g = np.random.default_rng(0)
    documents = [np.zeros(n, int) for n in g.integers(10, 3000, 3000)]
    sequences = list(pack(documents, 2048))
    assert sum(s.used for s in sequences) / (len(sequences) * 2048) > 0.97


def test_inputs_and_labels_by_hand():
    """Documents a b END and c END, and two tokens of fill."""
    row = shifted(np.array([1, 2, 9, 3, 9, 9, 9]), np.array([0, 3]), 5, 9)
    assert row["tokens"].tolist() == [9, 1, 2, 9, 3, 9, 9]
    assert row["labels"].tolist() == [1, 2, 9, 3, 9, IGNORE, IGNORE]
    assert row["starts"].tolist() == [True, False, False, True, False, True, False]


def test_prepared_text_is_the_text(tmp_path):
    texts = write_texts(tmp_path / "texts", 12)
    (texts / "ünïcode.txt").write_text("naïve — 漢字 🦊" * 100)
    prepared, report = prepare(Options(inputs=(texts,), output=tmp_path / "data", sequence_length=256))
    dataset = import_streaming().StreamingDataset(local=str(tmp_path / "data"), batch_size=1, shuffle=False)
    found, long = [], {}
    for row in dataset:
        bounds = [*row["starts"], row["used"]]
        for a, b in itertools.pairwise(bounds):
            found.append(row["tokens"][a:b])
    joined = b"".join(bytes(piece[piece < 256].astype(np.uint8)) for piece in found)
    for path in texts.iterdir():
        data = path.read_bytes()
        if len(data) < 256:
            assert data in joined
        long[path.name] = len(data) + 1
    assert sum(len(p) for p in found) == prepared.tokens == sum(long.values()) == sum(report.lengths)
    assert sum(int((p == 256).sum()) for p in found) == prepared.documents == 13
    assert prepared.sequences == len(dataset)
    assert report.histogram.sum() == prepared.tokens


def test_jsonl_and_bpe(tmp_path, capsys):
    lines = [{"id": i, "body": f"line {i} of a small corpus " * 20} for i in range(50)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["prepare", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), "--sequence-length", "128"]
    assert main([*arguments, "--text-key", "body", "--train-bpe", "300"]) == 0
    printed = capsys.readouterr().out
    assert "50 documents" in printed
    assert "most frequent" in printed
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    ids = tokenizer.encode([lines[7]["body"]])[0]
    assert tokenizer.decode(ids) == lines[7]["body"]
    assert open_folder(tmp_path / "out").vocab == tokenizer.vocab == 300


def test_bpe_knows_all_bytes():
    tokenizer = train_bpe(["abc abd"], 300)
    text = "日本 \x01 🦊"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert byte_tokenizer().decode(byte_tokenizer().encode([text])[0]) == text


def test_rerun_changes_nothing_and_half_is_detected(tmp_path, capsys):
    texts = write_texts(tmp_path / "texts", 5)
    arguments = ["prepare", str(texts), "--output", str(tmp_path / "data"), "--sequence-length", "128"]
    assert main(arguments) == 0
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    assert main(arguments) == 0
    assert "already prepared" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    assert main([*arguments[:-1], "256"]) == 2
    assert "another preparation (it differs in sequence_length)" in capsys.readouterr().err
    (texts / "new.txt").write_text("more text")
    assert main(arguments) == 2
    assert "it differs in files" in capsys.readouterr().err
    (texts / "new.txt").unlink()

    unfinished(tmp_path / "data").mkdir()  # what a kill leaves
    os.rename(tmp_path / "data", unfinished(tmp_path / "data") / "data")
    (unfinished(tmp_path / "data") / "lock").touch()
    with pytest.raises(ValueError, match="did not finish"):
        open_folder(tmp_path / "data")
    assert main(arguments) == 0
    assert open_folder(tmp_path / "data").documents == 5
    assert not unfinished(tmp_path / "data").exists()


def test_a_kill_while_writing_leaves_no_folder(tmp_path, monkeypatch):
    from foxdist.data import prepare as module

    texts = write_texts(tmp_path / "texts", 5)
    options = Options(inputs=(texts,), output=tmp_path / "data", sequence_length=128)
    real = module._sample
    calls = []
    monkeypatch.setattr(module, "_sample", lambda *a: calls.append(0) or (real(*a) if len(calls) < 20 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        prepare(options)
    assert not options.output.exists()
    assert unfinished(options.output).exists()
    with pytest.raises(ValueError, match="did not finish"):
        open_folder(options.output)


def test_what_prepare_did_not_write_is_not_deleted(tmp_path, capsys):
    texts = write_texts(tmp_path / "texts", 2)
    mine = unfinished(tmp_path / "data")
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert main(["prepare", str(texts), "--output", str(tmp_path / "data"), "--sequence-length", "128"]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert (mine / "notes.txt").read_text() == "mine"


def test_a_tokenizer_may_leave_ids_out(tmp_path):
    vocab = {"<eos>": 0, "a": 1, "b": 70_000}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "t.json"))
    (tmp_path / "text.txt").write_text("a b b a")
    options = Options(
        inputs=(tmp_path / "text.txt",),
        output=tmp_path / "data",
        sequence_length=128,
        tokenizer=str(tmp_path / "t.json"),
    )
    prepared, _ = prepare(options)
    assert prepared.vocab == 70_001
    dataset = import_streaming().StreamingDataset(local=str(tmp_path / "data"), shuffle=False, batch_size=1)
    assert dataset[0]["tokens"][:5].tolist() == [1, 70_000, 70_000, 1, 0]


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["absent.txt", "--output", "o"], "no such file or folder"),
        (["empty", "--output", "o"], "holds no file"),
        (["texts", "--output", "o", "--sequence-length", "100"], "multiple of 128; use 128"),
        (["texts", "--output", "texts"], "holds other files"),
        (["texts", "--output", "o", "--tokenizer", "absent.json"], "no such file"),
        (["texts", "--output", "o", "--tokenizer", "bad.json"], "not a Hugging Face"),
        (["texts", "--output", "o", "--train-bpe", "100"], "at least 257"),
        (["bad.jsonl", "--output", "o"], "bad.jsonl:2: no text under 'text'; must be an object with one; it has txt;"),
        (["torn.jsonl", "--output", "o"], "torn.jsonl:1: not a JSON line"),
        (["odd.jsonl", "--output", "o"], "odd.jsonl:1: 'utf-8' codec can't encode"),
        (["binary", "--output", "o"], "holds no text (1 files are not UTF-8 text)"),
        (["texts", "--output", "bad.json/o"], "Not a directory"),
        (["texts", "--output", "o", "--include", "*.c"], "holds no file that --include and --exclude leave"),
        (
            ["texts", "--output", "o", "--min-bytes", "99999"],
            "no text (2 documents are shorter than --min-bytes 99999)",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x.bin").write_bytes(bytes(range(256)))
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not fine"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "fi')
    (tmp_path / "odd.jsonl").write_text('{"text": "\\ud800"}')
    assert main(["prepare", *arguments]) == 2
    assert word in capsys.readouterr().err
    assert not list(tmp_path.glob("*.unfinished"))


def test_two_preparations_of_one_folder_do_not_meet(tmp_path, monkeypatch, capsys):
    arguments = ["prepare", str(write_texts(tmp_path / "texts", 2)), "--output", str(tmp_path / "data")]

    def refuse(*_):
        raise BlockingIOError

    unfinished(tmp_path / "data").mkdir()
    (unfinished(tmp_path / "data") / "lock").write_text("process 5 on n1\n")
    monkeypatch.setattr("fcntl.lockf", refuse)  # as another process's lock does
    assert main(arguments) == 2
    assert "process 5 on n1 is writing it" in capsys.readouterr().err


def test_excluded_names_are_left_out(tmp_path, capsys):
    texts = write_texts(tmp_path / "texts", 3)
    write_texts(texts / "site-packages", 4)
    (texts / "module.pyc").write_text("text, but compiled by name")
    common = ["prepare", str(texts), "--sequence-length", "128"]
    assert main([*common, "--output", str(tmp_path / "a"), "--exclude", "site-packages", "*.pyc"]) == 0
    assert open_folder(tmp_path / "a").documents == 3


def test_only_included_names_are_taken(tmp_path):
    """By a file's own name; a file that is named itself is taken whatever its name."""
    texts = write_texts(tmp_path / "texts", 3)
    write_texts(texts / "more.txt", 2)
    (texts / "module.c").write_text("int x;")
    (tmp_path / "other.py").write_text("x = 1")
    common = ["prepare", str(texts), str(tmp_path / "other.py"), "--sequence-length", "128"]
    for i, (chosen, documents) in enumerate([(["*.c"], 2), (["*.c", "00[01].txt"], 6), (["texts"], 1)]):
        assert main([*common, "--output", str(tmp_path / str(i)), "--include", *chosen]) == 0
        assert open_folder(tmp_path / str(i)).documents == documents


def test_short_documents_are_left_out(tmp_path, capsys):
    """By bytes, whatever holds the documents; a BPE does not see them either."""
    (tmp_path / "a.txt").write_text("漢" * 33)  # 99 bytes
    (tmp_path / "b.txt").write_text("漢" * 33 + "x")
    lines = [{"text": "zyzyzy " * 10}, {"text": "quick " * 20}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["prepare", str(tmp_path), "--output", str(tmp_path / "data"), "--sequence-length", "128"]
    assert main([*arguments, "--min-bytes", "100", "--train-bpe", "1000"]) == 0
    assert "left out 2 documents shorter than 100 bytes" in capsys.readouterr().out
    assert open_folder(tmp_path / "data").documents == 2
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer.json")
    assert len(tokenizer.encode(["quick"])[0]) == 1
    assert len(tokenizer.encode(["zyzyzy"])[0]) == 6


def test_what_an_older_version_prepared_is_still_known(tmp_path, capsys):
    """It wrote neither `include` nor `min_bytes`."""
    texts = write_texts(tmp_path / "texts", 2)
    arguments = ["prepare", str(texts), "--output", str(tmp_path / "data"), "--sequence-length", "128"]
    assert main(arguments) == 0
    description = tmp_path / "data" / "foxdist.json"
    found = json.loads(description.read_text())
    assert found["settings"].pop("include") is found["settings"].pop("min_bytes") is None
    description.write_text(json.dumps(found))
    assert main(arguments) == 0
    assert main([*arguments, "--min-bytes", "5"]) == 2
    assert "it differs in min_bytes" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing shard", "short shard", "no index", "bad description"])
def test_damaged_folders_are_named(tmp_path, damage):
    data = write_data(tmp_path / "data", documents=5)
    shard = data / "shard.00000.mds"
    if damage == "missing shard":
        shard.unlink()
    elif damage == "short shard":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "no index":
        (data / "index.json").unlink()
    else:
        (data / "foxdist.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.path="):
        open_folder(data)


# ---- loading


def test_order_does_not_depend_on_ranks_and_resumes_across_epochs(ranks, tmp_path):
    data = write_data(tmp_path / "data", documents=24)
    batch = 8
    per_epoch = open_folder(data).sequences // batch
    steps = 2 * per_epoch + 3
    alone = ranks(1, read, data, 1, batch, steps, None)
    expected = by_step(alone, 1)
    assert len({s for step in expected[:per_epoch] for s in step}) == per_epoch * batch, "an epoch repeats nothing"
    assert expected[:per_epoch] != expected[per_epoch : 2 * per_epoch], "epochs differ in order"
    for size, cp in ((2, 1), (2, 2), (4, 2)):
        assert by_step(ranks(size, read, data, cp, batch, steps, None), cp) == expected
    for at in (0, 2, per_epoch - 1, per_epoch, steps - 2):
        state = alone[0][1][at]
        assert json.loads(json.dumps(state)) == state
        assert by_step(ranks(2, read, data, 1, batch, steps - at - 1, state), 1) == expected[at + 1 :], at


def test_worker_processes_change_nothing(ranks, tmp_path):
    data = write_data(tmp_path / "data", documents=24)
    plain, workers = (by_step(ranks(1, read, data, 1, 4, 6, None, n), 1) for n in (0, 2))
    assert plain == workers


def test_jobs_share_no_names_on_a_node(tmp_path, monkeypatch):
    """The names of two jobs' shared memory never meet, so neither can take away the other's saved position."""
    folder = write_data(tmp_path / "data", documents=10)
    numbers = iter([1_900_000_000, 7])
    monkeypatch.setattr("secrets.randbelow", lambda n: next(numbers))
    options = {"batch": 1, "global_batch": 1, "cp": 1, "shuffle": False, "seed": 0, "workers": 0}
    one, two = (Loader(folder, open_folder(folder), **options) for _ in range(2))
    # The first from there on that is free here: locks in /tmp and shared memory of killed jobs may stand in between.
    assert 1_900_000_000 <= one._loader.dataset._shm_prefix_int < 1_900_001_000
    assert 7 <= two._loader.dataset._shm_prefix_int < 1_000_000


def test_what_reads_ahead_ends_with_who_reads(tmp_path):
    """Its threads would ask for ever whether to go on; a process that trains more than once would be full of them."""
    data = write_data(tmp_path / "data", documents=24)
    loader = Loader(data, open_folder(data), batch=4, global_batch=4, cp=1, shuffle=True, seed=0, workers=0)
    batches = iter(loader)
    next(batches)
    reading = loader._dataset._iterator
    assert not reading.should_exit()
    del batches
    assert reading.should_exit()
    end = time.monotonic() + 30
    while reading._num_exited < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert reading._num_exited == 2


def test_shared_memory_may_get_its_size_late():
    """A rank that is held up between naming and sizing it must not end the others."""
    import_streaming()
    from streaming.base.shared import SharedMemory

    name = f"foxdist{os.getpid()}"
    path = Path("/dev/shm") / name
    path.touch()
    late = threading.Timer(0.5, lambda: os.truncate(path, 64))
    late.start()
    try:
        assert SharedMemory(name, size=64).shm.size == 64
    finally:
        late.join()
        path.unlink()


def test_who_waits_for_others_data_may_not_be_silent(monkeypatch):
    """Loading takes its time, but a rank that has loaded and falls silent has died."""
    monkeypatch.setattr(progress, "host", Place(step=8, warm=True, part="data"))
    said = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: said.append(word_at(progress.where(), 0, 600, {})))
    assert word_at(progress.where(), 0, 600, {}).patience == 600
    next_of_all(iter([SimpleNamespace(targets=lambda: 3)]), SimpleNamespace(cp=1, device="cpu"))
    assert [(word.patience, word.waits) for word in said] == [(SILENT, True)]


def test_too_little_data_is_named(tmp_path):
    data = write_data(tmp_path / "data", documents=2)
    with pytest.raises(ValueError, match="a step needs 512"):
        read(0, 1, data, 1, 512, 1, None)


def test_batches_hold_what_training_reads(tmp_path):
    data = write_data(tmp_path / "data", documents=10)
    batch = next(iter(Loader(data, open_folder(data), batch=4, global_batch=4, cp=1, shuffle=True, seed=0, workers=0)))
    assert batch.tokens.shape == batch.labels.shape == batch.starts.shape == (4, 512)
    assert (batch.tokens.dtype, batch.starts.dtype) == (torch.int64, torch.bool)
    assert batch.starts[:, 0].all()
    assert batch.tokens[batch.starts].eq(256).all()
    inside = ~batch.starts[:, 1:] & (batch.labels[:, 1:] != IGNORE)
    assert torch.equal(batch.tokens[:, 1:][inside], batch.labels[:, :-1][inside])
    assert batch.targets() == int((batch.labels != IGNORE).sum())
