"""Each loss of the library beside the formula that TRL, verl and NeMo-RL use, on the same numbers: the table of actors/learner/README.md.

    python -m tests.bench.formulas

The formulas of the others are written here from their definitions, in plain sums, float64. Values are of one position: 12 ids, no stop
event, the teacher's 4 likeliest ids where a formula takes a top-k. `gradient` is the cosine of both gradients by the student's logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_governor import forward_kl, jsd, mixed_kl, reverse_kl, sampled_reverse_kl, top_k_divergence

VOCABULARY, TOP_K, SEED = 12, 4, 0


@dataclass(frozen=True)
class Pair:
    """One formula of ours beside one of theirs."""

    ours: str
    theirs: str
    value: tuple[float, float]
    gradient_cosine: float
    remark: str

    def row(self) -> str:
        """As a line of the table."""
        return f"| {self.ours} | {self.theirs} | {self.value[0]:.6f} | {self.value[1]:.6f} | {self.gradient_cosine:.4f} | {self.remark} |"


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.log() - b.log())).sum()


def pairs() -> list[Pair]:
    """All rows of the table."""
    generator = torch.Generator().manual_seed(SEED)
    student, teacher = (torch.randn(VOCABULARY, generator=generator, dtype=torch.float64) * 1.5 for _ in range(2))
    q = teacher.softmax(-1)
    top = q.topk(TOP_K).indices
    sampled = top[0]  # in the teacher's top-k, so that both sides have the same classes

    def expected(per_token: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Each id as the sampled one, weighed by the student's probability of it: the expectation over samples, in value and gradient."""
        return lambda x: sum(x.softmax(-1)[y].detach() * per_token(x, torch.tensor(y)) for y in range(VOCABULARY))

    def ours_top_k(loss: str) -> Callable[[Tensor], Tensor]:
        return lambda x: top_k_divergence(loss, x, sampled, q[sampled].log(), top, q[top].log())

    def gkd(beta: float) -> Callable[[Tensor], Tensor]:
        def value(x: Tensor) -> Tensor:
            p = x.softmax(-1)
            m = beta * q + (1 - beta) * p
            return beta * kl(q, m) + (1 - beta) * kl(p, m)

        return value

    def renormalised(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[top].softmax(-1), q[top] / q[top].sum()

    def k3(x: Tensor, y: Tensor) -> Tensor:
        r = q[y].log() - x.log_softmax(-1)[y]
        return torch.exp(r) - r - 1

    def k1_advantage(x: Tensor, y: Tensor) -> Tensor:
        logp = x.log_softmax(-1)[y]
        return (logp - q[y].log()).detach() * torch.exp(logp - logp.detach())

    sampled_loss = expected(lambda x, y: sampled_reverse_kl(x, y, q[y].log()))
    rows: list[tuple[str, Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor], str]] = [
        ("`reverse_kl`", lambda x: reverse_kl(x, teacher), "TRL GKD beta 1", lambda x: kl(x.softmax(-1), q), "equal"),
        ("`forward_kl`", lambda x: forward_kl(x, teacher), "TRL GKD beta 0", lambda x: kl(q, x.softmax(-1)), "equal"),
        ("`jsd(beta=.2)`", lambda x: jsd(x, teacher, beta=0.2), "TRL GKD beta .2", gkd(0.2), "equal"),
        (
            "`forward_kl`, top-k",
            ours_top_k("forward_kl"),
            "NeMo-RL forward, top-k",
            lambda x: kl(*reversed(renormalised(x))),
            "equal where the sampled id is in the top-k; else ours has it as one class more",
        ),
        ("`reverse_kl`, top-k", ours_top_k("reverse_kl"), "NeMo-RL reverse, top-k", lambda x: kl(*renormalised(x)), "equal, likewise"),
        (
            "`mixed_kl(reverse_share=.3)`",
            lambda x: mixed_kl(x, teacher, reverse_share=0.3),
            "NeMo-RL mixed, weight .7, top-k = vocabulary",
            lambda x: 0.7 * kl(q, x.softmax(-1)) + 0.3 * kl(x.softmax(-1), q),
            "equal; their weight is that of the forward part",
        ),
        (
            "`forward_kl`, top-k",
            ours_top_k("forward_kl"),
            "verl forward_kl_topk",
            lambda x: (q[top] * (q[top].log() - x.log_softmax(-1)[top])).sum(),
            "theirs does not renormalise: it also pulls the student's mass into the top-k, and can be negative",
        ),
        (
            "`sampled_reverse_kl`",
            sampled_loss,
            "verl k1 as advantage",
            expected(k1_advantage),
            "equal; verl also clamps k1 to +-10 (`advantage_clip_nats` 10)",
        ),
        (
            "`sampled_reverse_kl`",
            sampled_loss,
            "verl k3, back-propagated",
            expected(k3),
            "k3's value estimates reverse KL, its gradient is that of forward KL",
        ),
        (
            "`sampled_reverse_kl`",
            sampled_loss,
            "exact reverse KL",
            lambda x: kl(x.softmax(-1), q),
            "equal gradient in expectation: what the estimator is for",
        ),
    ]
    return [_pair(ours, f, theirs, g, remark, student) for ours, f, theirs, g, remark in rows]


def _pair(ours: str, f: Callable[[Tensor], Tensor], theirs: str, g: Callable[[Tensor], Tensor], remark: str, student: Tensor) -> Pair:
    values, gradients = [], []
    for formula in (f, g):
        x = student.clone().requires_grad_()
        value = formula(x)
        value.backward()
        values.append(float(value.detach()))
        gradients.append(x.grad)
    cosine = float(torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0))
    return Pair(ours, theirs, (values[0], values[1]), cosine, remark)


def table() -> str:
    """The table in Markdown."""
    head = "| ours | theirs | our value | their value | gradient | |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(pair.row() for pair in pairs()) + "\n"


if __name__ == "__main__":
    print(table(), end="")
