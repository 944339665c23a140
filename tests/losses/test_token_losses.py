"""The chunked losses against the plain formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from supra.losses import token_losses as losses
from supra.losses.token_losses import TopK, next_token_nats, token_losses

TOKENS, VOCABULARY = 37, 101


def inputs(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, TOKENS, VOCABULARY, generator=generator).to(dtype)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = -100
    return student.requires_grad_(), teacher, labels


def plain(student, teacher, labels, temperature):
    """Both sums, in float64, from the definitions."""
    valid = labels != -100
    student, teacher = student.double()[valid], teacher.double()[valid]
    next_token = F.cross_entropy(student, labels[valid], reduction="sum")
    p = (teacher / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    return next_token, (p * (p.log() - q.log())).sum() * temperature**2


@pytest.fixture(autouse=True, params=[7 * VOCABULARY, 2**20], ids=["chunks", "one_chunk"])
def chunk_elements(request, monkeypatch):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 1.7)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # measured: 3e-16, 5e-8, 2e-3 of the largest gradient; bf16 keeps 8 bits
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)],
    ids=str,
)
def test_values_and_gradients(dtype, tolerance, temperature, weights):
    student, teacher, labels = inputs(dtype)
    exact = student.detach().double().requires_grad_()
    next_token, kl = plain(exact, teacher, labels, temperature)
    (2 * (weights[0] * next_token + weights[1] * kl)).backward()

    result = token_losses(
        student,
        labels,
        teacher,
        next_token_weight=weights[0],
        kl_weight=weights[1],
        temperature=temperature,
    )
    (2 * result.total).backward()

    value_tolerance = min(tolerance, 1e-6)  # sums are float32 whatever the logits are
    assert result.next_token.item() == pytest.approx(next_token.item(), rel=value_tolerance)
    if weights[1]:
        assert result.kl.item() == pytest.approx(kl.item(), rel=value_tolerance)
    total = weights[0] * next_token + weights[1] * kl
    assert result.total.item() == pytest.approx(total.item(), rel=value_tolerance)
    assert student.grad.dtype == dtype
    error = (student.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < tolerance
    assert student.grad[labels == -100].abs().max() == 0


def test_a_teacher_is_matched_by_itself():
    student, _, labels = inputs(torch.float32)
    result = token_losses(student, labels, student.detach(), next_token_weight=0.0, kl_weight=1.0)
    result.total.backward()
    assert abs(result.kl.item()) < 1e-5
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_is_a_divergence_over_k_tokens_and_a_bucket(temperature):
    student, teacher, labels = inputs(torch.float64)
    top = TopK.of(teacher, 9, temperature)
    assert top.log_probabilities.dtype == torch.float16

    exact, valid = student.detach().clone().requires_grad_(), labels != -100
    p, q = top.log_probabilities.double().exp(), (exact / temperature).softmax(-1)
    q = q.gather(-1, top.tokens)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1)[valid] for x in (p, q))
    kl = (p * (p.log() - q.log())).sum() * temperature**2
    (0.7 * kl).backward()

    weights = {"next_token_weight": 0.0, "kl_weight": 0.7, "temperature": temperature}
    result = token_losses(student, labels, top, **weights)
    result.total.backward()
    assert result.kl.item() == pytest.approx(kl.item(), rel=1e-12)
    assert (student.grad - exact.grad).abs().max() < 1e-12 * exact.grad.abs().max()


def test_top_k_may_be_all_tokens():
    student, teacher, labels = inputs(torch.float32)
    top = TopK.of(teacher, 10 * VOCABULARY, 1.0)
    results = [token_losses(student, labels, x, kl_weight=1.0).kl for x in (teacher, top)]
    assert results[1].item() == pytest.approx(results[0].item(), rel=1e-3)  # float16


def test_masked_rows_may_hold_anything():
    student, teacher, labels = inputs(torch.float32)
    with torch.no_grad():
        student[labels == -100] = torch.nan
    result = token_losses(student, labels, teacher, kl_weight=1.0)
    result.total.backward()
    assert torch.isfinite(result.total) and torch.isfinite(student.grad).all()


def test_nats_of_each_token():
    student, _, labels = inputs(torch.float32)
    nats = next_token_nats(student, labels)
    expected = F.cross_entropy(student.double(), labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(nats.double(), expected, atol=1e-5, rtol=0)


def test_second_derivatives_raise():
    """For a sum of the logits they would be silently wrong."""
    x, weight = torch.randn(TOKENS, 8, requires_grad=True), torch.randn(8, VOCABULARY)
    labels = torch.arange(TOKENS)
    total = token_losses(x @ weight.requires_grad_(), labels).total
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(total, x, create_graph=True)


def test_autocast_changes_nothing():
    student, teacher, labels = inputs(torch.float32)
    found = []
    for enabled in (False, True):
        student.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = token_losses(student, labels, teacher, kl_weight=1.0)
        result.total.backward()
        found.append((result.kl, result.next_token, student.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
