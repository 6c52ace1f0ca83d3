"""Every native kernel equals its reference, forward and backward, to bf16's precision (2^-8 a rounding)."""

import pytest
import torch
from torch import Tensor

from shoal.ops import cpu, dispatch, reference

pytestmark = pytest.mark.skipif("native" not in cpu.status(), reason=cpu.status())


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def twins(fast, slow, inputs: list[Tensor], tolerance: float = 6e-3) -> None:
    """Outputs and gradients of `fast` on bf16 against `slow` on the same values in fp32."""
    ours = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    y, expected = fast(*ours), slow(*exact)
    assert relative_error(y, expected) < tolerance
    grad = bf16(*y.shape, seed=99)
    y.backward(grad)
    expected.backward(grad.float())
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert a.grad is not None and b.grad is not None
        assert relative_error(a.grad, b.grad) < tolerance, f"gradient {i}"


def test_rms_norm_also_on_a_slice_of_wider_rows():
    weight = 1 + 0.1 * torch.randn(48)
    twins(
        lambda x, w: dispatch.rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(x, w, 1e-6), [bf16(37, 48), weight]
    )
    wide = bf16(37, 80)
    sliced = lambda norm: lambda x: norm(x[:, 16:64], weight, 1e-6)  # noqa: E731
    twins(sliced(dispatch.rms_norm), sliced(reference.rms_norm), [wide])


def test_swiglu_on_two_tensors_and_on_halves_of_one():
    twins(dispatch.swiglu, reference.swiglu, [bf16(33, 64), bf16(33, 64, seed=1)])
    halves = lambda f: lambda x: f(*x.chunk(2, -1))  # noqa: E731
    twins(halves(dispatch.swiglu), halves(reference.swiglu), [3 * bf16(33, 96)])


def test_swiglu_on_columns_of_wider_rows():
    """Rows neither F nor 2F apart: gate and up are a third of one tensor each."""
    thirds = lambda f: lambda x: f(*x.chunk(3, -1)[:2])  # noqa: E731
    twins(thirds(dispatch.swiglu), thirds(reference.swiglu), [3 * bf16(33, 96)])


def test_pairs_turn_also_in_a_slice_of_wider_heads():
    turn = torch.rand(37, 16) * 6.28
    turned = lambda rotate: lambda x: rotate(x, turn.cos(), turn.sin())  # noqa: E731
    twins(turned(dispatch.rotate_pairs), turned(reference.rotate_pairs), [bf16(37, 32)])
    twins(turned(dispatch.rotate_pairs), turned(reference.rotate_pairs), [bf16(37, 3, 32)])
    sliced = lambda rotate: lambda x: turned(rotate)(x.split([16, 32], -1)[1])  # noqa: E731
    twins(sliced(dispatch.rotate_pairs), sliced(reference.rotate_pairs), [bf16(37, 3, 48)])
    transposed = lambda rotate: lambda x: turned(rotate)(x.transpose(1, 2))  # noqa: E731
    twins(transposed(dispatch.rotate_pairs), transposed(reference.rotate_pairs), [bf16(37, 32, 3)])


def test_rows_choose_their_largest_first():
    x = torch.randn(50, 24)
    x[3, 5:] = -torch.inf
    assert torch.equal(dispatch.top_k(x, 4), x.topk(4).indices)
    assert torch.equal(dispatch.top_k(x, 4).sort().values, reference.top_k(x, 4).sort().values)


@pytest.mark.parametrize(("rows", "chosen"), [(70, 3), (1, 1), (0, 2)])
def test_rows_are_sorted_by_expert(rows: int, chosen: int):
    experts_TK = torch.rand(rows, 8).topk(chosen).indices
    experts_TK[experts_TK == 2] = 5
    for ours, expected in zip(dispatch.sort_by_expert(experts_TK, 8), reference.sort_by_expert(experts_TK, 8)):
        assert torch.equal(ours, expected)
    for strange in (8, -1):
        with pytest.raises(AssertionError, match="beyond the 8"):
            dispatch.sort_by_expert(torch.full((2, chosen), strange), 8)


@pytest.mark.parametrize("experts, chosen", [(8, 3), (4, 1)])
def test_experts_rows_go_out_and_come_back(experts: int, chosen: int):
    choice = torch.rand(70, experts).topk(chosen).indices
    choice[choice == 2] = (choice[choice == 2] + 1) % experts  # one expert gets nothing
    places = dispatch.sort_by_expert(choice, experts)
    assert places.counts_E.sum() == 70 * chosen and places.counts_E[2] == 0
    twins(lambda x: dispatch.gather_rows(x, places), lambda x: reference.gather_rows(x, places), [bf16(70, 32)])
    weights = torch.rand(70, chosen)
    slow = lambda y, w: reference.weigh_rows(y, w, places)  # noqa: E731
    twins(lambda y, w: dispatch.weigh_rows(y, w, places), slow, [bf16(70 * chosen, 32), weights])
    twins(
        lambda x, w: dispatch.grouped_linear(x, w, places.counts_E),
        lambda x, w: reference.grouped_linear(x, w, places.counts_E),
        [bf16(70 * chosen, 32), bf16(experts, 48, 32, seed=1)],
    )


@pytest.mark.parametrize("counts", [[1, 0, 700, 6, 13], [24, 0], [5, 385, 0, 768]])
@pytest.mark.parametrize("K, N", [(16, 80), (272, 64), (48, 208), (528, 16)])
def test_grouped_products_of_any_number_of_rows(counts: list[int], K: int, N: int):
    x, weight, counts_E = bf16(sum(counts), K), bf16(len(counts), N, K, seed=1), torch.tensor(counts)
    assert cpu.takes_product(x, weight, K, N)
    twins(
        lambda x, w: dispatch.grouped_linear(x, w, counts_E),
        lambda x, w: reference.grouped_linear(x, w, counts_E),
        [x, weight],
    )
    dy = bf16(sum(counts), N, seed=2)
    ours, torchs = (dispatch.grouped_weight_gradient(d, x.to(d.dtype), counts_E) for d in (dy, dy.float()))
    assert relative_error(ours, torchs) < 6e-3 and not ours[torch.tensor(counts) == 0].any()


def test_products_of_rows_that_lie_apart():
    """Columns of a wider tensor, and a gradient whose rows are all one."""
    wide, weight = bf16(37, 80), bf16(48, 32, seed=1)
    product = lambda times: lambda x, w: times(x[:, 16:48], w)  # noqa: E731
    twins(product(dispatch.linear), product(torch.nn.functional.linear), [wide, weight])
    weight.requires_grad_()
    dispatch.linear(wide[:, 16:48], weight).sum().backward()
    assert weight.grad is not None
    assert relative_error(weight.grad, wide[:, 16:48].float().sum(0).expand(48, 32)) < 6e-3


def test_products_that_do_not_fit_are_refused():
    x, stacked, starts = bf16(40, 32), bf16(2, 48, 64, seed=1), torch.tensor([0, 10, 40])
    with pytest.raises(AssertionError, match="32"):
        cpu.GroupedLinear.apply(x, stacked, starts)
    with pytest.raises(AssertionError, match="39"):
        cpu.GroupedLinear.apply(x, stacked[:, :, :32], torch.tensor([0, 10, 39]))
    with pytest.raises(AssertionError, match="41"):
        cpu.weight_gradient(bf16(41, 48), x, starts)


def test_a_matrix_that_lies_transposed_is_not_copied():
    x, weight = bf16(40, 32), bf16(2, 32, 48, seed=1).mT
    expected = torch.cat([x[:10].float() @ weight[0].float().t(), x[10:].float() @ weight[1].float().t()])
    assert relative_error(cpu.GroupedLinear.apply(x, weight, torch.tensor([0, 10, 40])), expected) < 6e-3


def test_branches_are_what_the_kernel_takes_them_for():
    two, other = [range(10), range(10, 20)], [range(5), range(20, 25)]
    for strange in ([two, other, [range(10), range(25, 30)]], [two, [range(20, 30)], [range(10), range(30, 35)]]):
        with pytest.raises(AssertionError, match="segment 2"):
            dispatch.Branches.of(strange)
    with pytest.raises(AssertionError, match="without rows"):
        dispatch.Branches.of([two, []])


def test_products_are_torchs_where_it_has_amx_and_where_rows_are_few(monkeypatch):
    x, stacked, counts_E = bf16(100, 32), bf16(3, 48, 32, seed=1), torch.tensor([40, 0, 60])
    assert cpu.takes_product(x, stacked, 48, 32) and not cpu.takes_product(x[:23], stacked, 48, 32)
    assert not cpu.takes_product(x, stacked, 40, 32) and not cpu.takes_product(x.float(), stacked, 48, 32)
    monkeypatch.setattr(cpu, "cpu_flags", lambda: cpu.NEEDED | {"amx_bf16"})
    assert not cpu.takes_product(x, stacked, 48, 32)
    twins(
        lambda x, w: dispatch.grouped_linear(x, w, counts_E),
        lambda x, w: reference.grouped_linear(x, w, counts_E),
        [x, stacked],
    )


@pytest.mark.parametrize("lengths", [[200], [64, 1, 63, 65, 7]])
@pytest.mark.parametrize("H, G, K, V", [(4, 4, 96, 64), (6, 2, 64, 64), (2, 1, 32, 48), (2, 2, 192, 128)])
def test_attention(lengths: list[int], H: int, G: int, K: int, V: int):
    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in (q, k, v)), lengths, strict=True)
        return torch.cat([reference.causal_attention(a, b, c, 0.2, n) for a, b, c, n in parts])

    inputs = [bf16(200, H, K), bf16(200, G, K, seed=1), bf16(200, G, V, seed=2)]
    twins(lambda q, k, v: dispatch.causal_attention(q, k, v, lengths, 0.2), slow, inputs, tolerance=1e-2)


@pytest.mark.parametrize("prefix, tails", [(10, [33, 1, 60]), (64, [7, 64]), (130, [70, 5, 64]), (0, [9, 12])])
@pytest.mark.parametrize("H, G, K, V", [(4, 4, 96, 64), (6, 2, 64, 64)])
def test_attention_of_segments_that_begin_alike(prefix: int, tails: list[int], H: int, G: int, K: int, V: int):
    """Twice a prefix and what follows it, and a segment by itself: as if each segment lay there whole."""
    segments, at = [], 0
    for _ in range(2):
        shared, at = range(at, at + prefix), at + prefix
        for n in tails:
            segments.append([shared, range(at, at + n)])
            at += n
    segments.append([range(at, at + 37)])
    to = dispatch.Branches.of(segments)
    assert to.shared.tolist() == 2 * [0, *[prefix] * (len(tails) - 1)] + [0]

    def slow(*inputs: Tensor) -> Tensor:
        q, k, v = (x[to.rows_M] for x in inputs)
        parts = zip(*(x.split(to.lengths) for x in (q, k, v)), to.lengths, strict=True)
        return torch.cat([reference.causal_attention(a, b, c, 0.2, n) for a, b, c, n in parts])[to.first_T]

    inputs = [bf16(at + 37, H, K), bf16(at + 37, G, K, seed=1), bf16(at + 37, G, V, seed=2)]
    twins(lambda q, k, v: dispatch.branching_attention(q, k, v, to, 0.2), slow, inputs, tolerance=1e-2)
    q, k, v = (x.float() for x in inputs)
    assert relative_error(dispatch.branching_attention(q, k, v, to, 0.2), slow(q, k, v)) < 1e-5


def test_attention_keeps_large_scores_finite():
    q = 60 * bf16(130, 1, 32)
    o = dispatch.causal_attention(q, q, bf16(130, 1, 32, seed=1), [130], 1.0)
    assert torch.isfinite(o).all()
    expected = reference.causal_attention(q.float(), q.float(), bf16(130, 1, 32, seed=1).float(), 1.0, 130)
    assert relative_error(o, expected) < 1e-2


@pytest.mark.parametrize("bad", ["q", "k"])
def test_a_nan_shows_in_every_row_that_sees_it_and_in_no_other(bad: str):
    q, k, v = (bf16(200, 2, 32, seed=seed).requires_grad_() for seed in range(3))
    (q if bad == "q" else k).data[70, 1, 3] = torch.nan
    o = dispatch.causal_attention(q, k, v, [130, 70], 0.2)
    sees = torch.zeros(200, 2, dtype=torch.bool)
    sees[slice(70, 71) if bad == "q" else slice(70, 130), 1] = True
    assert torch.equal(o.isnan().any(-1), sees) and torch.equal(o.isnan().all(-1), sees)
    o.sum().backward()
    assert all(x.grad is not None and x.grad[70, 1].isnan().any() for x in (q, k))
    assert all(x.grad is not None and not x.grad[:, 0].isnan().any() for x in (q, k, v))


@pytest.mark.parametrize("vocab, place", [(64, 5), (50, 5), (50, 49)])
def test_a_nan_among_logits_shows_in_loss_and_gradient(vocab: int, place: int):
    logits, targets = bf16(3, vocab), torch.tensor([1, 2, 3])
    logits[1, place] = torch.nan
    nll = dispatch.cross_entropy_(logits, targets, 1.0)
    assert nll.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(-1).tolist() == [False, True, False]


def test_a_target_outside_the_vocabulary_is_refused():
    with pytest.raises(AssertionError, match="64"):
        dispatch.cross_entropy_(bf16(2, 64), torch.tensor([1, 64]), 1.0)


def test_no_rows_are_no_trouble():
    x, weight = bf16(0, 32).requires_grad_(), torch.ones(32)
    places = dispatch.sort_by_expert(torch.empty(0, 2, dtype=torch.int64), 4)
    rows = dispatch.gather_rows(dispatch.rms_norm(x, weight, 1e-6), places)
    rows = dispatch.grouped_linear(dispatch.swiglu(rows, rows), bf16(4, 32, 32).requires_grad_(), places.counts_E)
    y = dispatch.weigh_rows(rows, torch.empty(0, 2), places)
    heads = y.view(0, 2, 16)
    dispatch.causal_attention(heads, heads, heads, [], 1.0).sum().backward()
    assert y.shape == (0, 32) and x.grad is not None and x.grad.shape == (0, 32)
    assert dispatch.cross_entropy_(bf16(0, 32), torch.empty(0, dtype=torch.int64), 1.0).shape == (0,)


@pytest.mark.parametrize("vocab", [64, 50])
def test_cross_entropy_and_its_gradient(vocab: int):
    logits, targets = 4 * bf16(21, vocab), torch.randint(vocab, (21,))
    targets[5] = -100
    slow = logits.float()
    expected = reference.cross_entropy_(slow, targets, 0.25)
    nll = dispatch.cross_entropy_(logits, targets, 0.25)
    assert relative_error(nll, expected) < 1e-5 and nll[5] == 0
    assert relative_error(logits, slow) < 4e-3 and not logits[5].any()


@pytest.mark.parametrize("step_of", [cpu.adamw_, reference.adamw_])
def test_adamw_equals_torch(step_of):
    torch.manual_seed(0)
    p = torch.randn(1003)
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    m, v, weight = torch.zeros(1003), torch.zeros(1003), torch.zeros(1003, dtype=torch.bfloat16)
    for step in range(1, 4):
        grad = torch.randn(1003).bfloat16()
        theirs.grad = 0.5 * grad.float()
        optimizer.step()
        first, second = 1 - 0.9**step, 1 - 0.95**step
        numbers = dispatch.AdamW(0.5, 0.01, 0.9, 0.95, 1e-8, 0.1, 0.01 / first, second**-0.5)
        step_of(p, m, v, grad, weight, numbers)
    assert relative_error(p, theirs.detach()) < 1e-6
    assert torch.equal(weight, p.bfloat16())


@pytest.mark.parametrize("n", [1, 50, 2**15, 2**16 + 7])
def test_norms_of_dense_numbers(n: int):
    x = bf16(n)
    assert relative_error(dispatch.norm(x), x.double().norm()) < 1e-5
    x[-1] = torch.nan
    assert dispatch.norm(x).isnan()
