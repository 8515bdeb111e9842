"""`bound="tight"`: its numbers against brute force, its guarantee against q, k and gates that are made to break it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foxdist.attention import RESET, Acp, forgetting_attention, tight
from foxdist.attention import gates as definition
from foxdist.attention.acp import bounded_heads
from foxdist.layout import BLOCK

from cases import GATES, inputs

SCALE = 0.25  # of head dimension 16


def flatter(q, k):
    """Every query looks for the first key, the farthest there is."""
    return k[:, :1].expand_as(q).clone(), k


def avoid(q, k):
    """Every query turns away from its own key, which then has the least weight that it can have."""
    return -k, k


def equal(q, k):
    """All keys are one: Jensen is exact, the mean key as long as any."""
    return q, k[:, 7:8].expand_as(k).clone()


def turned(q, k):
    """Every query looks for what the first half of the keys is, and the second half is its opposite."""
    one = k[:, :1].expand_as(k).clone()
    one[:, k.shape[1] // 2 :] *= -1
    return k[:, :1].expand_as(q).clone(), one


def outlier(q, k):
    """One early key outweighs all others."""
    k = k.clone()
    k[:, 5] *= 40
    return k[:, 5:6] / 40 + 0.1 * q, k


DESIGNS = {"random": lambda q, k: (q, k), **{f.__name__: f for f in (flatter, avoid, equal, turned, outlier)}}


def pruned_weight(q, k, log_f, start, rows=None, scale=SCALE):
    """The largest weight that a query loses [H], by the definition in float64; rows: the queries, default all."""
    length = q.shape[1]
    rows = torch.arange(length) if rows is None else rows
    worst = []
    for head in range(q.shape[2]):
        key = k[0, :, head * k.shape[2] // q.shape[2]].double()
        c = log_f[0, :, head].double().cumsum(0)
        logits = scale * q[0, rows, head].double() @ key.T + c[rows, None] - c
        weights = logits.masked_fill(torch.arange(length) > rows[:, None], -math.inf).softmax(-1)
        first = start[0, head, rows // BLOCK].long() * BLOCK
        worst.append((weights * (torch.arange(length) < first[:, None])).sum(-1).max())
    return torch.stack(worst)


def start_of(q, k, log_f, log_eps=-10.0, bound=None):
    acp = Acp(log_eps=log_eps, bound="tight", logit_bound=bound)
    return forgetting_attention(q, k, k, log_f, scale=SCALE, acp=acp, backend="torch", return_stats=True)[1].start


def scores_of(q, k, log_f):
    """(scores, base) of one whole sequence."""
    c_in = definition.block_sums(log_f)
    return tight.block_scores(q, k, c_in, SCALE), definition.bases(definition.block_table(c_in))


def brute_force(q, k, log_f, log_eps, bound=math.inf):
    """start [H, N] by the inequalities of the docstring, tile by tile and query by query, without any margin."""
    length, blocks = q.shape[1], -(-q.shape[1] // BLOCK)
    start = torch.zeros(q.shape[2], blocks, dtype=torch.int64)
    for head in range(q.shape[2]):
        query = SCALE * q[0, :, head].double()
        key = k[0, :, head * k.shape[2] // q.shape[2]].double()
        c = torch.cat([torch.zeros(1), log_f[0, :, head]]).double().cumsum(0)  # c[t + 1] is c of token t
        ends = [min(length, (n + 1) * BLOCK) for n in range(blocks)]
        mass = torch.stack([(c[end] - c[1 : end + 1]).exp().sum() for end in ends])
        longest = torch.stack([key[:end].norm(dim=-1).max() for end in ends])
        summed = torch.stack([(c[e] - c[s + 1 : e + 1]).exp() @ key[s:e] for s, e in zip([0, *ends], ends)])
        for m in range(blocks):
            rows = torch.arange(m * BLOCK, ends[m])
            size = query[rows].norm(dim=-1).max()
            past = sum((c[ends[m - 1]] - c[ends[b]]).exp() * summed[b].norm() for b in range(m))
            least = mass[m - 1] * (-size * past / mass[m - 1]).exp() if m else torch.tensor(0.0)
            own = (query[rows] * key[rows]).sum(-1)
            kept = own.exp() + (c[rows + 1] - c[m * BLOCK]).exp() * least
            for n in range(m):
                lost = (c[rows + 1] - c[ends[n]]).exp() * mass[n] * (size * longest[n]).clamp_max(bound).exp()
                if (lost / kept).max().log() <= log_eps:
                    start[head, m] = n + 1
    return start.flip(-1).cummin(-1).values.flip(-1)


@pytest.mark.parametrize("kind", ["mild", "initial", "mixed"])
@pytest.mark.parametrize("kv_heads, bound", [(3, math.inf), (1, 2.0)])
def test_start_is_what_the_inequalities_say(kind, kv_heads, bound):
    q, k, _, log_f = inputs(1, 1100, 3, kv_heads, kind=kind)
    log_f[:, 700] = -3.0
    expected = brute_force(q, k, log_f, -6.0, bound)
    assert expected.max() > 2, "nothing was pruned, so nothing was tested"
    assert torch.equal(start_of(q, k, log_f, -6.0, None if bound == math.inf else bound)[0].long(), expected)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(GATES)),
    design=st.sampled_from(sorted(DESIGNS)),
    length=st.integers(128, 1700),
    log_eps=st.floats(-20, -0.1),
    size=st.sampled_from([0.0, 0.1, 1.0, 3.0, 30.0]),
    resets=st.lists(st.integers(0, 1699), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 10_000),
)
def test_pruned_weight_never_exceeds_eps(kind, design, length, log_eps, size, resets, dtype, kv_heads, seed):
    q, k, _, log_f = inputs(1, length, 2, kv_heads, kind=kind, seed=seed)
    q, k = DESIGNS[design](q * size, k.repeat_interleave(2 // kv_heads, 2))
    q, k = q.to(dtype), k[:, :, :kv_heads].to(dtype)
    log_f[:, [t for t in resets if t < length]] = RESET
    start = start_of(q, k, log_f, log_eps)
    assert pruned_weight(q, k, log_f, start).max() <= math.exp(log_eps)


@pytest.mark.parametrize("design", sorted(DESIGNS))
@pytest.mark.parametrize("kind", ["mild", "mixed"])
def test_pruned_weight_at_16k(kind, design):
    q, k, _, log_f = inputs(1, 16384, 2, kind=kind)
    q, k = DESIGNS[design](q, k)
    start = start_of(q, k, log_f)
    assert start.max() > 0, "nothing was pruned, so nothing was tested"
    rows = torch.cat([torch.arange(0, 16384, BLOCK), torch.arange(3, 16384, 97)])
    assert pruned_weight(q, k, log_f, start, rows).max() <= math.exp(-10)


def test_what_is_allowed_is_used():
    """Keys that are all alike and looked for by none: the bound is nearly exact, so the weight lost is nearly eps."""
    q, k, _, log_f = inputs(1, 8192, 1, kind="open")
    log_f[:] = -1 / 512  # a block forgets a quarter
    q = torch.zeros_like(q)
    lost = pruned_weight(q, k, log_f, start_of(q, k, log_f)).max()
    assert math.exp(-10.3) < lost <= math.exp(-10)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(GATES)),
    design=st.sampled_from(sorted(DESIGNS)),
    length=st.integers(130, 2500),
    log_eps=st.floats(-20, -0.5),
    seed=st.integers(0, 10_000),
)
def test_no_more_is_kept_than_by_the_published_rule(kind, design, length, log_eps, seed):
    q, k, v, log_f = inputs(1, length, 2, kind=kind, seed=seed)
    q, k = DESIGNS[design](q, k)
    bound = float((q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * SCALE)
    # Rounding is paid for by as little as this.
    published = Acp(log_eps=log_eps - 1e-3 * (1 + bound), logit_bound=bound)
    paper = forgetting_attention(q, k, v, log_f, scale=SCALE, acp=published, return_stats=True)[1].start
    assert (start_of(q, k, log_f, log_eps, bound) >= paper).all()


def test_start_never_decreases():
    """Blocks with numbers of their own: here one whose queries are long reaches back farther than those before it."""
    q, k, _, log_f = inputs(1, 4096, 2, kind="mild")
    q[:, 2048:2100] *= 6
    start = start_of(q, k, log_f)
    plain = start_of(*inputs(1, 4096, 2, kind="mild")[:2], log_f)
    assert (start.diff(dim=-1) >= 0).all()
    assert (start[..., 16] < plain[..., 16]).all()
    assert (start[..., 14] < plain[..., 14]).any(), "an earlier block keeps what a later one needs"


def test_a_reset_prunes_everything_before_it():
    q, k, _, log_f = inputs(1, 1024, 2, kind="open")
    log_f[:, 512] = RESET
    start = start_of(q, k, log_f)
    assert start[..., 4:].eq(4).all()
    assert start[..., :4].eq(0).all()


def test_scores_are_on_the_safe_side():
    """Each against float64; not below (the mass: not off), and not above by more than the margin."""
    q, k, _, log_f = inputs(1, 900, 2, 1, kind="initial", dtype=torch.bfloat16)
    found, _ = scores_of(q, k, log_f)
    queries, keys = (x[0].transpose(0, 1).double() for x in (q * SCALE, k))
    c = definition.block_sums(log_f)[0].double()
    for head in range(2):
        for n in range(8):
            rows = slice(n * BLOCK, min(900, (n + 1) * BLOCK))
            own_q, own_k = queries[head, rows], keys[0, rows]
            c_in = c[head, n, : len(own_q)]
            weight = (c_in[-1] - c_in).exp()
            exact = [
                (c_in - (own_q * own_k).sum(-1)).max(),
                own_q.norm(dim=-1).max(),
                own_k.norm(dim=-1).max(),
                weight.sum(),
                (weight @ own_k).norm(),
            ]
            difference = found[0, head, n].double() - torch.stack(exact)
            largest = torch.tensor([1e-3, 1e-3, 1e-3, 1e-4, 0.1])
            assert (difference[[0, 1, 2, 4]] >= 0).all()
            assert (difference.abs() <= largest).all()


def test_the_bound_is_measured_by_the_way():
    q, k, _, log_f = inputs(2, 500, 4, 2, kind="mild")
    scores, base = scores_of(q * 3, k, log_f)
    _, bound = tight.start_blocks(base, scores, -10.0, None)
    keys = k.repeat_interleave(2, 2).double()
    logits = torch.einsum("bihd,bjhd->bhij", 3 * q.double(), keys) * SCALE
    largest = 3 * q.norm(dim=-1).amax(1) * keys.norm(dim=-1).amax(1) * SCALE
    assert (logits.abs().amax((-1, -2)) <= bound).all()
    assert (bound <= largest * (1 + 3e-4)).all()
    assert bounded_heads(bound, (2, 4), Acp(bound="tight"), 100.0).all()


@pytest.mark.parametrize("where", ["q", "k", "log_f"])
def test_not_a_number(where):
    """Every start stays where a plan can be made of it."""
    tensors = dict(zip(("q", "k", "log_f"), [*inputs(1, 1200, 2, kind="mild")[:2], inputs(1, 1200, 2, kind="mild")[3]]))
    tensors[where][:, 300] = math.nan
    scores, base = scores_of(*tensors.values())
    start, _ = tight.start_blocks(base, scores, -10.0, None)
    assert ((start >= 0) & (start <= torch.arange(start.shape[-1]))).all()
    assert start.diff(dim=-1).ge(0).all()
