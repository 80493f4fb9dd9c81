"""More than 2^31 elements: a 32-bit address anywhere would read or write another row. Needs a GPU with 40 GB free."""

import pytest
import torch

from cpo_kernels import LogprobPlan, linear_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NUM_PROBES = 40  # rows compared with fp64: the first, the last, and some between


def probe(num_rows: int, vocab: int, width: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score two targets on every row, the last column one of them; compare rows spread over all of them."""
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", path)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, generator=generator, device="cuda", dtype=torch.bfloat16) * width**-0.5
    rows = torch.arange(num_rows).repeat(2)
    targets = torch.cat([torch.full((num_rows,), vocab - 1), torch.arange(num_rows) * 7919 % (vocab - 1)])
    plan = LogprobPlan.build(rows, targets, torch.zeros_like(rows), 1).to("cuda")
    chosen = torch.linspace(0, num_rows - 1, min(NUM_PROBES, num_rows)).long()
    exact = hidden[chosen].double().requires_grad_()
    logps = torch.cat([exact @ part.double().T for part in weight.split(1 << 16)], dim=1).log_softmax(-1)
    picked = logps[torch.arange(len(chosen))[:, None], targets.view(2, -1)[:, chosen].T.cuda()]
    picked.sum().backward()
    hidden.requires_grad_(path == "chunk")
    result = linear_logprob(hidden, weight, plan, outputs=("entropy", "mean_logit", "is_top1"), impl="triton")
    got = result.token_logps.view(2, -1)[:, chosen].T
    torch.testing.assert_close(got.double(), picked.detach(), rtol=1e-4, atol=1e-4)
    entropy = -(logps.exp() * logps).sum(-1).detach()
    torch.testing.assert_close(result.entropy[chosen].double(), entropy, rtol=1e-4, atol=1e-4)
    if path == "chunk":
        result.segment_logps.sum().backward()
        error = (hidden.grad[chosen].double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
        assert float(error.max()) <= 1e-2


@pytest.mark.parametrize("path", ["chunk", "fused"])
def test_head_of_more_than_2_31_elements(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, width = 262_144, 8_256
    assert vocab * width > 2**31
    probe(64, vocab, width, path, monkeypatch)


@pytest.mark.parametrize("path", ["chunk", "fused"])
def test_more_than_2_31_logits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk, so that the addresses inside a chunk pass 2^31 too."""
    num_rows, vocab = 129 * 128, 131_072  # whole row tiles
    assert num_rows * vocab > 2**31
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(num_rows * vocab))
    probe(num_rows, vocab, 64, path, monkeypatch)
