"""The attention benchmark: its gates, its counting, its refusal of what is wrong, and what it leaves."""

import json
import math
import shutil
import sys

import pytest
import torch
from matplotlib import image
from safetensors.torch import load_file, save_file

from foxdist import checkpoint, run_folder
from foxdist.attention import RESET, Acp, forgetting_attention, naive_forgetting_attention
from foxdist.bench import __main__ as bench
from foxdist.bench import gates as gate_kinds
from foxdist.bench import implementations, measure, peers
from foxdist.bench.measure import Case, Shape
from foxdist.data.folder import open_folder
from foxdist.data.loader import one_sequence

from cases import relative

CPU = torch.device("cpu")
TINY = ["attention", "--device", "cpu", "--shapes", "2x16", "--lengths", "256", "--repeats", "1"]

# A right implementation, and what may be wrong with one.
PEER = """
from foxdist.attention import forgetting_attention
def attend(q, k, v, log_f, acp):
    return {result}
"""


def peer(folder, name, result="forgetting_attention(q, k, v, log_f)"):
    path = folder / f"{name}.py"
    path.write_text(PEER.format(result=result))
    return ["--peer", f"{name}={path}"]


@pytest.fixture(autouse=True)
def no_peer_stays():
    """Peers are modules of this process."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("peer_", "fla")):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def short_checks(monkeypatch):
    """Whole blocks and a rest; the definition at the true lengths takes seconds."""
    monkeypatch.setattr("foxdist.bench.attention.CHECKED", (512, 389))


@pytest.fixture(autouse=True)
def one_thread():
    """For tensors this small, threads mostly wait for each other: on a busy machine, five times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("heads, dim", [(16, 64), (8, 16), (4, 64)])
def test_acp_gates_keep_thirty_percent(heads, dim):
    """Of the calibration's own noise, and of other noise."""
    for seed in (0, 1):
        c = gate_kinds.find("acp").draw(heads, dim, 16384, seed)[0].T.double().cumsum(-1)
        start = gate_kinds.first_kept(c, gate_kinds.threshold(math.sqrt(dim), 16384, -10.0))
        assert gate_kinds.kept_share(start) == pytest.approx(0.30, abs=0.01)


def test_the_boundary_written_down_twice_is_one():
    """The benchmark's own, for masks and calibration, against foxdist's: the same tiles."""
    case = Case(Shape(8, 4, 16), 1100, torch.float32, CPU)
    inputs = measure.make_inputs(case, gate_kinds.find("acp"), 0)
    _, stats = forgetting_attention(*inputs[:4], acp=inputs.acp, return_stats=True)
    delta = implementations.published_threshold(inputs.acp, 1100)
    start = gate_kinds.first_kept(inputs.log_f[0].T.double().cumsum(-1), delta)
    assert torch.equal(start, stats.start[0].long())
    assert 0.3 < gate_kinds.kept_share(start) < 0.9
    assert measure.kept(measure.counted(inputs, "paper")) == pytest.approx(gate_kinds.kept_share(start))


def test_regimes_are_what_they_say():
    def kept(name):
        c = gate_kinds.find(name).draw(4, 16, 4096, 0)[0].T.double().cumsum(-1)
        return gate_kinds.kept_share(gate_kinds.first_kept(c, gate_kinds.threshold(4.0, 4096, -10.0)))

    assert kept("initial") < kept("local") < kept("mixed") < kept("open") == 1


def test_inputs_stay_under_their_bound():
    """Rounding to bfloat16 lengthens some vectors; U is of the rounded ones."""
    inputs = measure.make_inputs(Case(Shape(4, 2, 64), 512, torch.bfloat16, CPU), gate_kinds.find("open"), 0)
    q, k = (x.double().transpose(1, 2) for x in (inputs.q, inputs.k))
    logits = (q @ k.repeat_interleave(2, 1).mT).abs().amax((0, 2, 3)) / 8
    assert (logits <= inputs.acp.logit_bound).all()
    assert (inputs.acp.logit_bound < 8 * 1.01).all()


def test_flops_are_two_products_over_the_causal_half():
    """At length T forward multiplies T^2 / 2 pairs with D elements, twice, 2 FLOPs each."""
    case = Case(Shape(3, 1, 32), 1024, torch.float32, CPU)
    assert case.forward_flops == 2 * 2 * 3 * 32 * 1024**2 / 2


def test_rates_count_what_the_times_took(monkeypatch):
    """A forward of 2 ms and 8 ms for both, on inputs of which a quarter is kept."""
    case = Case(Shape(2, 2, 16), 512, torch.float32, CPU)
    gates = gate_kinds.find("open")
    implementation = implementations.registry("paper")["foxdist-torch"]
    times = iter([[2.0, 1.0, 3.0], [8.0, 7.0, 9.0]])
    monkeypatch.setattr(measure, "milliseconds", lambda call, device: next(times))
    monkeypatch.setattr(measure, "kept", lambda stats: 0.25)
    row = measure.measure(implementation, case, gates, 1, "paper")
    flops = 2 * 2 * 2 * 16 * 512**2 / 2
    assert (row["forward(ms)"], row["forward_least(ms)"], row["forward_greatest(ms)"]) == (2, 1, 3)
    assert row["forward_dense(TFLOP/s)"] == pytest.approx(flops / 2e-3 / 1e12)
    assert row["forward+backward_dense(TFLOP/s)"] == pytest.approx(3.5 * flops / 8e-3 / 1e12)
    assert row["forward+backward_kept(TFLOP/s)"] == pytest.approx(3.5 * flops / 8e-3 / 1e12 / 4)


def test_layers_of_recorded_gates_are_averaged(monkeypatch, tmp_path):
    """Two layers of 1 and 3 ms, two repeats each, in turn."""
    save_file({"log_f": torch.full((2, 256, 2), -0.1)}, tmp_path / "g.safetensors")
    times = iter([[1.0], [1.0], [3.0], [3.0], [1.0], [1.0], [3.0], [3.0]])
    monkeypatch.setattr(measure, "milliseconds", lambda call, device: next(times))
    case = Case(Shape(2, 2, 16), 256, torch.float32, CPU)
    gates = gate_kinds.find(str(tmp_path / "g.safetensors"))
    row = measure.measure(implementations.registry("paper")["foxdist-torch"], case, gates, 2, "paper")
    assert row["forward(ms)"] == row["forward+backward(ms)"] == 2
    assert next(times, None) is None


def test_the_whole_command(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    arguments = ["attention", "--device", "cpu", "--shapes", "2x16,4x16", "--kv-heads", "2", "--repeats", "2"]
    names = ["--implementations", "foxdist-torch", "sdpa-flash", "mine"]
    more = ["--lengths", "256", "300", "--gates", "mixed", "--output", str(out)]
    assert bench.main([*arguments, *names, *more, *peer(tmp_path, "mine")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| 4/2x16 | 256 |") == 3
    assert (out / "table.md").read_text() == printed
    result = json.loads((out / "attention.json").read_text())
    assert [(r["shape"], r["tokens"], r["implementation"]) for r in result["rows"]] == [
        (shape, tokens, name)
        for shape in ("2x16", "4/2x16")
        for tokens in (256, 300)
        for name in ("foxdist-torch", "sdpa-flash", "mine")
    ]
    for row in result["rows"]:
        assert row["failed"] is None
        assert 0 < row["forward_least(ms)"] <= row["forward(ms)"] <= row["forward_greatest(ms)"]
        assert row["peak_memory(MiB)"] is None
    for check in result["checks"]:
        softmax = check["implementation"] == "sdpa-flash"
        assert list(check["errors"]) == ["out", "dq", "dk", "dv", *([] if softmax else ["dlog_f"])]
        assert max(check["errors"].values()) < 1e-5
    assert {c["tokens"] for c in result["checks"]} == {512, 389}
    assert result["matmul(TFLOP/s)"] > 0
    pixels = image.imread(out / "attention.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 500
    assert 0.01 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5, "neither blank nor black"


@pytest.mark.parametrize(
    "result, said",
    [
        ("forgetting_attention(q, k, v, log_f) * 1.01", "out is wrong: 1.0e-02"),
        ("forgetting_attention(q, k, v, log_f.detach() + 0 * log_f)", "dlog_f is wrong: 1.0e+00"),
        ("forgetting_attention(q, k, v, log_f) * float('nan')", "out is wrong: nan"),
        ("forgetting_attention(q[:, 1:], k, v, log_f)", "k: shape"),
    ],
)
def test_a_wrong_peer_gets_no_time(tmp_path, capsys, result, said):
    names = ["--implementations", "foxdist-torch", "wrong"]
    assert bench.main([*TINY, *names, "--output", str(tmp_path), *peer(tmp_path, "wrong", result)]) == 0
    found = json.loads((tmp_path / "attention.json").read_text())
    assert {r["implementation"] for r in found["rows"]} == {"foxdist-torch"}
    (failed,) = (c["failed"] for c in found["checks"] if c["implementation"] == "wrong")
    assert said in failed
    assert said in capsys.readouterr().out


def test_a_wrong_backend_fails_the_command(tmp_path, monkeypatch, capsys):
    real = implementations.forgetting_attention
    monkeypatch.setattr(implementations, "forgetting_attention", lambda *a, **k: real(*a, **k) * 1.01)
    assert bench.main([*TINY, "--output", str(tmp_path)]) == 1
    assert "foxdist-torch 2x16 512 tokens: out is wrong" in capsys.readouterr().err
    assert json.loads((tmp_path / "attention.json").read_text())["rows"] == []
    assert not (tmp_path / "attention.png").exists()


def test_one_that_breaks_costs_no_other_its_numbers(tmp_path):
    breaks = "forgetting_attention(q, k, v, log_f) if q.shape[1] != 256 else 1 / 0"
    names = ["--implementations", "breaks", "foxdist-torch"]
    assert bench.main([*TINY, *names, "--output", str(tmp_path), *peer(tmp_path, "breaks", breaks)]) == 0
    broken, right = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert broken["failed"] == "ZeroDivisionError: division by zero"
    assert right["failed"] is None
    assert "ZeroDivisionError" in (tmp_path / "table.md").read_text()


def test_a_backend_that_is_not_here_is_said(tmp_path, capsys, monkeypatch):
    """In the table when it is a default; an error when it was named."""
    monkeypatch.setattr("foxdist.bench.attention.defaults", lambda device: ["foxdist-gluon", "foxdist-torch"])
    assert bench.main(TINY) == 0
    assert "- foxdist-gluon: not available: backend='gluon'" in capsys.readouterr().out
    assert bench.main([*TINY, "--implementations", "foxdist-gluon"]) == 2
    assert "--implementations foxdist-gluon: not available here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--shapes", "4by16"], "--shapes 4by16"),
        (["--shapes", "0x16"], "--shapes 0x16"),
        (["--heads", "4"], "--head-dim"),
        (["--shapes", "4x16", "--kv-heads", "3"], "--kv-heads 3"),
        (["--gates", "acp", "--shapes", "2x16"], "2 heads"),
        (["--gates", "nowhere"], "nowhere: neither a file nor one of acp"),
        (["--gates", __file__], "must be a safetensors file"),
        (["--implementations", "flashy"], "--implementations flashy: unknown"),
        (["--peer", "fox"], "fox: not a peer"),
        (["--peer", "fox=/nowhere"], "no such path"),
        (["--peer", f"fox={json.__file__}"], "cannot be imported"),
        (["--peer", "foxdist-torch={file}"], "is the name of a built-in"),
    ],
)
def test_mistakes_are_named(arguments, said, capsys, tmp_path):
    file = peer(tmp_path, "file")[1].partition("=")[2]
    assert bench.main(["attention", "--device", "cpu", *(a.format(file=file) for a in arguments)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--lengths", "0"], ["--repeats", "0"], ["--kv-heads", "-1"]])
def test_numbers_are_checked(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["attention", "--device", "cpu", *arguments])
    assert f"argument {arguments[0]}" in capsys.readouterr().err


OFFICIAL = """
import torch
from foxdist.attention import forgetting_attention as ours
def forgetting_attention(q, k, v, log_fgate, *, head_first, adaptive_threshold):
    assert head_first and q.is_contiguous() and q.shape == k.shape == v.shape
    assert adaptive_threshold.shape == q.shape[:2]
    assert adaptive_threshold.dtype == torch.float32
    bound = (-10.0 - adaptive_threshold[0].max() - torch.tensor(q.shape[2]).log()) / 2
    assert 4.0 < bound < 4.05, bound  # sqrt(16), and what rounding adds
    return ours(*(x.transpose(1, 2) for x in (q, k, v, log_fgate))).transpose(1, 2)
"""
LINEAR = """
from foxdist.attention import forgetting_attention
def parallel_forgetting_attn(q, k, v, g):
    return forgetting_attention(q, k, v, g)
"""


def test_official_sources_are_called_their_way(tmp_path, capsys):
    """The kernels' conventions on stand-ins; packages' own __init__ files are not run."""
    fox = tmp_path / "forgetting-transformer" / "src/forgetting_transformer/ops/forgetting_attention.py"
    fla = tmp_path / "flash-linear-attention" / "fla/ops/forgetting_attn/__init__.py"
    for path, text in ((fox, OFFICIAL), (fla, LINEAR)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for folder in (fla.parents[2], fla.parents[1]):
        (folder / "__init__.py").write_text("raise ImportError('imports all models')")
    sources = [f"fox={tmp_path / 'forgetting-transformer'}", f"fla={tmp_path / 'flash-linear-attention'}"]
    names = ["--implementations", "fox", "fla", "--kv-heads", "1", "--output", str(tmp_path)]
    assert bench.main([*TINY, *names, *(word for source in sources for word in ("--peer", source))]) == 0
    result = json.loads((tmp_path / "attention.json").read_text())
    assert [c["failed"] for c in result["checks"]] == [None, None]
    assert [r["implementation"] for r in result["rows"]] == ["fox", "fla"]
    assert peers.load(sources[0]).prunes
    assert not peers.load(sources[1]).prunes


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("length", [512, 700])
def test_flex_computes_the_definition_over_the_kept_tiles(length):
    """torch's uncompiled flex_attention, on this machine: the score and the mask; tiles against the boundary."""
    inputs = measure.make_inputs(Case(Shape(4, 2, 16), length, torch.float32, CPU), gate_kinds.find("mixed"), 0)
    q, k, v, log_f = (x.transpose(1, 2).contiguous() for x in inputs[:4])
    mask = implementations.flex_mask(log_f, implementations.published_threshold(inputs.acp, length))
    _, stats = forgetting_attention(*inputs[:4], acp=inputs.acp, return_stats=True)
    own = torch.arange(stats.start.shape[-1])
    expected = (own >= stats.start[..., None]) & (own <= own[:, None])
    assert torch.equal(mask.to_dense().bool(), expected)
    assert stats.start.max() > 0
    out = implementations.flex_attend(q, k, v, log_f.cumsum(-1), mask).transpose(1, 2)
    assert relative(out, naive_forgetting_attention(*inputs[:4])) < 1e-5


def test_gates_of_a_run_are_recorded_and_measured(trained, tmp_path, capsys):
    """Trained on two ranks, recorded in this process; documents begin with RESET."""
    run, _ = trained
    file = tmp_path / "gates.safetensors"
    assert bench.main(["record-gates", str(run), "--output", str(file), "--sequence", "1", "--device", "cpu"]) == 0
    assert "[layers, tokens, heads] = [2, 512, 2]" in capsys.readouterr().out
    log_f = load_file(file)["log_f"]
    assert log_f.shape == (2, 512, 2)
    assert log_f.dtype == torch.float32
    resets = (log_f == RESET).all(-1)
    assert resets[:, 0].all()
    assert torch.equal(resets[0], resets[1])
    others = log_f[~resets]
    assert ((others > -5) & (others < -0.1)).all(), "a new model's gates are near 1/2"
    assert others.std() > 1e-3, "and depend on the data"
    arguments = ["attention", "--device", "cpu", "--shapes", "2x16", "--lengths", "384", "--repeats", "1"]
    assert bench.main([*arguments, "--gates", str(file)]) == 0
    assert "gates gates," in capsys.readouterr().out
    assert set(load_file(file)) == {"log_f"}
    with_inputs = [
        "record-gates",
        str(run),
        "--output",
        str(file),
        "--sequence",
        "1",
        "--device",
        "cpu",
        "--queries-and-keys",
    ]
    assert bench.main(with_inputs) == 0
    assert torch.equal(load_file(file)["log_f"], log_f)
    q, k = (load_file(file)[name] for name in ("q", "k"))
    assert q.shape == k.shape == (2, 512, 2, 16)
    torch.testing.assert_close(q.norm(dim=-1), torch.full((2, 512, 2), 4.0), rtol=0.2, atol=0.0)  # after QK-norm
    assert not torch.equal(q, k)
    drawn = gate_kinds.find(str(file)).draw(2, 16, 384, 3)
    assert torch.equal(drawn[0], log_f[1, :384])
    for wrong, said in ((["--shapes", "4x16"], "of 2 heads"), (["--lengths", "1024"], "longer than the 512 tokens")):
        assert bench.main([*arguments, "--gates", str(file), *wrong]) == 2
        assert said in capsys.readouterr().err


def test_recorded_gates_are_those_of_the_weights(trained, tmp_path):
    """Against the first layer's gate computed by hand from the saved parameters."""
    run, data = trained
    file = tmp_path / "gates.safetensors"
    assert bench.main(["record-gates", str(run), "--output", str(file), "--device", "cpu"]) == 0
    step, w = checkpoint.weights(run_folder.checkpoints(run))
    assert step == 2
    batch = one_sequence(data, open_folder(data), 0)
    x = w["embedding.weight"][batch.tokens[0]]
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], w["blocks.0.attention_norm.weight"], 1e-6)
    gate = x @ w["blocks.0.attention.forget_gate.weight"].T + w["blocks.0.attention.forget_gate.bias"]
    expected = torch.nn.functional.logsigmoid(gate).masked_fill(batch.starts[0, :, None], RESET)
    torch.testing.assert_close(load_file(file)["log_f"][0], expected, rtol=1e-5, atol=1e-6)


def test_weights_come_from_the_newest_good_checkpoint(trained, tmp_path):
    """A damaged one is passed over and left where it is; a half-written one, too."""
    root = run_folder.checkpoints(shutil.copytree(trained[0], tmp_path / "run"))
    (root / "step_00000003.unfinished").mkdir()
    victim = next((root / "step_00000002").glob("master_*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    before = sorted(root.rglob("*"))
    assert checkpoint.weights(root)[0] == 1
    assert sorted(root.rglob("*")) == before
    (root / "step_00000001" / checkpoint.MANIFEST).unlink()
    with pytest.raises(ValueError, match="holds no good checkpoint"):
        checkpoint.weights(root)


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert bench.main(["record-gates", str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_limits_follow_the_dtype():
    """float16 keeps three more bits than bfloat16; both limits let a correctly rounded result through."""
    wide, narrow = measure.limits(torch.bfloat16), measure.limits(torch.float16)
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for name in measure.NAMES:
        assert wide[name] == 8 * narrow[name]
        assert relative(x.bfloat16(), x) < wide[name] < 4 * relative(x.bfloat16(), x)
    assert set(measure.limits(torch.float32).values()) == {1e-4}
    assert Acp().log_eps == gate_kinds.LOG_EPS
