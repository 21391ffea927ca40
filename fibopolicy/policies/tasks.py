"""The task as an input of a policy that is trained on several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fibopolicy.errors import UserError, unknown

#: Size of the feature of a task.
TASK_FEATURES = 32


class TaskEncoder(nn.Module):
    """Tasks to features: a learned projection of the vector that stands for a task.

    With one-hot vectors, the features are a learned embedding. Other vectors, such as
    embeddings of sentences, say which tasks are alike.

    Args:
        names: names of the tasks.
        dim: D, the size of a vector.

    Attributes:
        index: the task of observations that do not say theirs, `None` if they must.
        vectors: `(tasks, D)`, of mean 0 and variance 1.
    """

    vectors: Tensor

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__()
        self.names = tuple(names)
        self.index = 0 if len(self.names) == 1 else None
        self.register_buffer("vectors", torch.zeros(len(self.names), dim))
        self.project = nn.Linear(dim, TASK_FEATURES)
        self.fit(torch.eye(len(self.names), dim))

    def fit(self, vectors: Tensor) -> None:
        """Let these vectors, float `(tasks, D)`, stand for the tasks."""
        centred = vectors - vectors.mean(dim=0)
        self.vectors.copy_(centred / centred.square().mean().sqrt().clamp(min=1e-6))

    def select(self, name: str) -> None:
        """Choose the task of observations that do not say theirs.

        Raises:
            UserError: the policy was not trained on this task.
        """
        if name not in self.names:
            raise unknown("task", name, self.names)
        self.index = self.names.index(name)

    def forward(self, obs: Mapping[str, Tensor], batch: int) -> Tensor:
        """Features `(B, F)` of the tasks `obs["task_index"]`, int64 `(B,)`."""
        index = obs.get("task_index")
        if index is None:
            if self.index is None:
                raise UserError(
                    f"the policy was trained on {len(self.names)} tasks and does not know which one"
                    f" to do; name a task, one of {', '.join(self.names)}"
                )
            index = torch.full((batch,), self.index, device=self.vectors.device)
        features: Tensor = self.project(self.vectors[index])
        return features
