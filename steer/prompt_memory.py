"""Which rows of a batch carry the same prompt, and what was computed from each of them once."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEPT = 4  # batches of prompts that are remembered: a solver step may call its denoiser for several, in turn


@dataclass
class Sight:
    """A tensor as it was when it was looked at; holding it keeps its memory from being given to another."""

    tensor: Tensor | None
    writes: int | None

    @classmethod
    def of(cls, x: Tensor | None) -> "Sight":
        return cls(x, writes(x))

    def is_still(self, x: Tensor | None) -> bool:
        """Whether x is that tensor, not written to since: told without reading it.

        Tensors of inference mode do not count what is written to them: of them that is never told.
        """
        if x is None or self.tensor is None:
            return x is self.tensor
        count = writes(x)
        return count is not None and count == self.writes and (x is self.tensor or _place(x) == _place(self.tensor))


def writes(x: Tensor | None) -> int | None:
    """How often a tensor was written to; None where that is not counted."""
    return None if x is None or x.is_inference() else x._version


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


def distinct_rows(*components: Tensor) -> Tensor:
    """(N,) int64 on the CPU: numbers of the distinct rows of tensors (N, …), by first appearance; rows of one number
    are equal in every part."""
    flat = [part.flatten(1) for part in components]
    number = torch.full((len(components[0]),), -1)
    distinct = 0
    while len(left := (number < 0).nonzero().flatten()):
        equal = torch.stack([(part[left.to(part.device)] == part[left[0]]).all(1) for part in flat]).all(0).cpu()
        equal[0] = True  # a row that holds NaN does not equal itself
        number[left[equal]] = distinct
        distinct += 1
    return number


@dataclass(eq=False)
class PromptBatch:
    """N rows of prompt features, as P distinct ones, and as M chunks of g rows of the same one (N = M·g).

    rows, mask     (P, S, C) and (P, 1, S), the distinct ones
    number         (N,) which of them each row of the batch is
    order, back    (N,) the order that makes chunks out of the batch, and the way back; None: it is in that order
    chunks         (M,) which of the distinct ones each chunk has
    folded, folded_mask  rows and mask of the chunks, (M, S, C) and (M, 1, S)
    seen           the tensors of the batch, when they were last looked at
    results        what was computed from the rows, by what computed it
    """

    rows: Tensor
    mask: Tensor | None
    number: Tensor
    order: Tensor | None
    back: Tensor | None
    chunks: Tensor
    folded: Tensor
    folded_mask: Tensor | None
    seen: tuple[Sight, Sight]
    results: dict[Any, Sight] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: Tensor, mask: Tensor | None) -> "PromptBatch":
        number = distinct_rows(*(part for part in (prompts, mask) if part is not None))
        size = math.gcd(*number.bincount().tolist())
        order = number.argsort(stable=True) if size > 1 else torch.arange(len(number))
        in_order = bool((order == torch.arange(len(order))).all())
        first = torch.stack([(number == value).nonzero()[0, 0] for value in range(int(number.max()) + 1)])
        chunks = number[order][::size].to(prompts.device)
        rows = prompts[first.to(prompts.device)]
        rows_mask = None if mask is None else mask[first.to(mask.device)]
        return cls(
            rows=rows,
            mask=rows_mask,
            number=number.to(prompts.device),
            order=None if in_order else order.to(prompts.device),
            back=None if in_order else order.argsort().to(prompts.device),
            chunks=chunks,
            folded=rows[chunks],
            folded_mask=None if rows_mask is None else rows_mask[chunks],
            seen=(Sight.of(prompts), Sight.of(mask)),
        )

    def is_of(self, prompts: Tensor, mask: Tensor | None) -> bool:
        """Whether this is the batch of these prompts: looks into them only where it cannot be told without."""
        pairs = zip(self.seen, (self.rows, self.mask), (prompts, mask), strict=True)
        same = all(seen.is_still(x) or _holds(rows, self.number, x) for seen, rows, x in pairs)
        if same:
            self.seen = Sight.of(prompts), Sight.of(mask)
        return same

    def fold(self, x: Tensor) -> Tensor:
        """Queries (N, L, d) → (M, g·L, d): those of one chunk one after the other."""
        x = x if self.order is None else x[self.order]
        return x.reshape(len(self.chunks), -1, x.shape[-1])

    def unfold(self, x: Tensor) -> Tensor:
        """(M, g·L, d) → (N, L, d), in the order of the batch."""
        x = x.reshape(len(self.number), -1, x.shape[-1])
        return x if self.back is None else x[self.back]


def _holds(rows: Tensor | None, number: Tensor, x: Tensor | None) -> bool:
    """Whether x is the distinct rows, each at its places."""
    if rows is None or x is None or (x.dtype, x.device) != (rows.dtype, rows.device):
        return False
    return x.shape == (len(number), *rows.shape[1:]) and torch.equal(x, rows[number])


@dataclass(eq=False)
class PromptMemory:
    """The last few batches of prompts that one module was called with, the latest first."""

    batches: list[PromptBatch] = field(default_factory=list)

    def find(self, prompts: Tensor, mask: Tensor | None = None) -> PromptBatch:
        """The batch of prompts (N, S, C) under a mask (N, 1, S)."""
        batch = next((known for known in self.batches if known.is_of(prompts, mask)), None)
        if batch is None:
            batch = PromptBatch.of(prompts, mask)
        self.batches = [batch, *(known for known in self.batches if known is not batch)][:KEPT]
        return batch

    def folded(self, x: Tensor) -> PromptBatch | None:
        """The batch whose chunks `x` is."""
        return next((batch for batch in self.batches if batch.folded is x), None)

    def forget_results(self) -> None:
        """Has everything computed anew."""
        for batch in self.batches:
            batch.results.clear()
