"""
The judge: a reward model for few labels.

A reward model usually is a trunk that learns to judge, by adapters or as a whole. That takes
thousands of comparisons. A person gives 200, and some of them are mistakes: an adapter learns these
by heart (readme.md has the figures). But the frozen model knows what answers are like already: its
hidden states tell how long an answer is, what its words are, and in which tone. So this judge reads
them and learns one weight for each, which is called a linear probe (Alain & Bengio 2016,
arXiv:1610.01644):

    r(x, y) = w · φ(x, y)        φ: of each layer, the mean over the answer's tokens, and its last

What PPO earns is σ(r - r'), where r' is the reward of an answer that the model itself wrote, to
some prompt of the list, and the mean over many of these. At first that is 1/2 on average. It cannot
grow beyond 1, so that nothing is won by more and more of what was liked once. (Fu et al. 2025,
arXiv:2502.18770, find that a reward should be a bounded function of a centred one.)

The probability of a label is Bradley-Terry's, σ(r(chosen) - r(rejected)). w is its most probable
value when, before there are any labels, w is normally distributed, and wide enough that the rewards
of two answers differ by about `prior`. This is a convex problem: one answer, found in seconds.

Because it is so cheap, there are 1 + FOLDS judges. The first learns from all labels and is the
reward model. Each of the others leaves out a part of them, on which it is tested. So every label
teaches, and every label tests a judge that has not learned from it.

Shapes: N labels, B texts of T tokens, C channels, F features, J = 1 + FOLDS judges.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt import lora
from mingpt.checkpoint import atomic_write
from mingpt.datasets import Comparisons
from mingpt.heads import first_column
from mingpt.model import GPT, last_real
from mingpt.model_files import load_file, write_safetensors
from mingpt.prefix import hidden_states
from mingpt.trunk import Trunk

FOLDS = 5  # parts of the labels, each of which one judge leaves out
FILE = "judge.safetensors"
SMALLEST = 1e-3  # a feature that varies less than this is as good as constant


class Judge(nn.Module):
    """Linear reward models on the frozen trunk of `model`, which is read without any adapter."""

    def __init__(self, model: GPT):
        super().__init__()
        trunk = lora.trunk_of(model)
        lora.prepare(trunk)
        # In a tuple, since PyTorch takes modules that are attributes for parts of this one.
        self.borrowed = (lora.AdaptedTrunk(trunk, None).eval(),)
        n_features = 2 * (1 + len(blocks_of(trunk))) * model.config.n_embd
        device = next(model.parameters()).device
        self.weight = nn.Parameter(torch.zeros(1 + FOLDS, n_features, device=device))
        self.register_buffer("scale", torch.ones(n_features, device=device))
        # r(x, y) of the answers to compare with, (M,).
        self.register_buffer("others", torch.empty(0, device=device), persistent=False)

    # -- what it reads -----------------------------------------------------------------------------

    @torch.no_grad()
    def features(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """(B, T) each -> (B, F): what the trunk's layers hold where the answers are.

        If each rows_per_prompt adjacent rows answer the same prompt, that prompt is read once.
        """
        [trunk] = self.borrowed
        prefix_length = first_column(completion_mask) if rows_per_prompt > 1 else 0
        written = completion_mask[:, prefix_length:]
        weights = written / written.sum(1, keepdim=True)  # (B, T'), for the mean
        rows, last = torch.arange(len(idx), device=idx.device), last_real(written)
        found: list[Tensor] = []

        def pool(hidden: Tensor) -> None:
            """Keep the mean over the answer, and its last token: (B, T', C) -> 2 of (B, C)."""
            if len(hidden) == len(idx):  # and not the prompts, which are read before
                found.append(torch.einsum("bt, btc -> bc", weights, hidden.float()))
                found.append(hidden[rows, last].float())

        # Hooks see what goes into the first block, and what comes out of each.
        blocks = blocks_of(trunk.trunk)
        hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: pool(inputs[0]))]
        hooks += [block.register_forward_hook(lambda _, __, y: pool(y)) for block in blocks]
        try:
            hidden_states(trunk, idx, attention_mask, prefix_length, rows_per_prompt)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(found, dim=1)

    def read(self, data: Comparisons, batch_size: int) -> Tensor:
        """The features of labels: (N, 2, F), the chosen answer first."""
        # Labels of about the same length together, so that there is little padding.
        order = sorted(range(len(data)), key=lambda i: n_tokens(*data[i]))
        features: list[Tensor] = []
        for first in range(0, len(order), batch_size):
            batch = data.collate([data[i] for i in order[first : first + batch_size]])
            # A batch is (B, 2, T); the trunk reads rows, (2B, T).
            rows = [x.flatten(0, 1).to(self.weight.device) for x in batch]
            features += self.features(*rows, rows_per_prompt=2).unflatten(0, (-1, 2))
        return torch.stack(features)[torch.tensor(order).argsort()]  # in the labels' own order

    # -- what it says ------------------------------------------------------------------------------

    def rewards(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., J): r(x, y) by each of the judges."""
        return (features / self.scale) @ self.weight.T

    @torch.no_grad()
    def reward(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """(B, T) each -> (B,), r(x, y) by the first judge. rows_per_prompt: as in `features`."""
        features = self.features(idx, attention_mask, completion_mask, rows_per_prompt)
        return self.rewards(features)[:, 0]

    def forward(
        self,
        idx: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        rows_per_prompt: int = 1,
    ) -> Tensor:
        """(B, T) each -> (B,), the mean of σ(r - r'): what PPO takes as its reward_fn.

        ValueError before `compare_with`.
        """
        if len(self.others) == 0:
            raise ValueError("there is nothing to compare with: call compare_with(rewards) first")
        rewards = self.reward(idx, attention_mask, completion_mask, rows_per_prompt)
        return torch.sigmoid(rewards[:, None] - self.others).mean(1)  # (B, M) -> (B,)

    def margins(self, features: Tensor) -> Tensor:
        """r(chosen) - r(rejected) by each judge: (N, 2, F) -> (N, J)."""
        return ((features[:, 0] - features[:, 1]) / self.scale) @ self.weight.T

    def compare_with(self, rewards: Tensor) -> None:
        """From now on, compare with answers that have these r(x, y), (M,)."""
        self.others = rewards.to(self.weight.device)

    # -- how it learns -----------------------------------------------------------------------------

    def study(self, features: Tensor, folds: list[int], prior: float = 1.0) -> None:
        """Take labels to learn from. features: (N, 2, F). folds: the part that each belongs to."""
        # Where two features are equal, their difference is exactly 0, and teaches exactly nothing.
        difference = features[:, 0] - features[:, 1]  # (N, F)
        std = features.flatten(0, 1).std(dim=0).clamp(min=SMALLEST)
        # With weights of variance 1, r(chosen) - r(rejected) then has variance 1, too, on average.
        self.scale.copy_(std * (difference / std).square().sum(1).mean().sqrt())
        device = features.device
        fold = torch.tensor(folds, device=device)[:, None]
        judge = torch.arange(1 + FOLDS, device=device)
        self.register_buffer("differences", difference / self.scale, persistent=False)
        self.register_buffer("learns", judge != fold + 1, persistent=False)  # (N, J)
        self.prior = prior

    def loss(self, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """-log of the posterior, given all labels by their numbers, (N,), and what is logged.

        For each judge it is divided by the number of its labels. The judges share no weights, so
        that the mean of their losses trains each as if it were alone.
        """
        learns = self.learns[labels]
        margins = self.differences[labels] @ self.weight.T  # (N, J)
        n = learns.sum(0)  # (J,)
        likelihood = (F.logsigmoid(margins) * learns).sum(0) / n
        penalty = self.weight.square().sum(1) / (2 * self.prior**2 * n)
        accuracy = (margins[:, 0] > 0).float().mean()
        held_out = (held_out_margins(margins, learns) > 0).float().mean()
        return (penalty - likelihood).mean(), {"accuracy": accuracy, "held_out_accuracy": held_out}

    # -- files -------------------------------------------------------------------------------------

    @torch.no_grad()
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the judges, and their margins on the labels that they have not learned from."""
        tensors = dict(self.state_dict())
        margins = self.differences @ self.weight.T
        tensors["held_out_margins"] = held_out_margins(margins, self.learns)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(folder) / FILE) as f:
            write_safetensors(f, tensors)

    @classmethod
    def load(cls, folder: str | Path, model: GPT) -> "tuple[Judge, Tensor]":
        """(a judge that was saved, its held-out margins (N,)). model: that which it learned on.

        ValueError for the judge of a model of another shape.
        """
        tensors, _ = load_file(Path(folder) / FILE)
        margins = tensors.pop("held_out_margins")
        judge = cls(model)
        if tensors["weight"].shape != judge.weight.shape:
            raise ValueError(
                f"{folder} holds the judge of another model: it reads {tensors['weight'].size(1)} "
                f"features, and this model has {judge.weight.size(1)}"
            )
        judge.load_state_dict(tensors)
        return judge.eval(), margins


def n_tokens(prompt: Tensor, answers: list[Tensor]) -> int:
    """How many tokens a label has, with the longer of its answers."""
    return len(prompt) + max(map(len, answers))


def blocks_of(trunk: Trunk) -> nn.ModuleList:
    """The blocks of a trunk. Each family keeps them in its only list of modules."""
    [blocks] = [module for module in trunk.children() if isinstance(module, nn.ModuleList)]
    return blocks


def held_out_margins(margins: Tensor, learns: Tensor) -> Tensor:
    """Of (N, J) margins, that by the judge which has not learned from the label: (N,)."""
    return margins[~learns]  # there is one for each label
