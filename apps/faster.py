"""How `steer sample` computes, which decides nothing about the images but their last bits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from steer.attention import BACKENDS, attention_backend
from steer.choices import choose
from steer.compiled import compiled
from steer.errors import InputError
from steer.microbatch import micro_batched
from steer.shared_prompt import shared_prompt


@dataclass(frozen=True)
class Faster:
    """What is switched on while images are made.

    attention      a backend of `steer.attention`
    share_prompts  keys and values of a prompt once for all its particles and steps (`steer.shared_prompt`)
    compiled       the denoiser through torch.compile (`steer.compiled`)
    micro_batch    rows that go through the denoiser at a time (`steer.microbatch`); 0: as many as the memory takes;
                   None: all, or not at all
    """

    attention: str = "auto"
    share_prompts: bool = False
    compiled: bool = False
    micro_batch: int | None = None

    def check(self) -> None:
        """Raises InputError for what cannot be, before any model is loaded."""
        choose("attention backend", self.attention, BACKENDS)
        if self.micro_batch is not None and self.micro_batch < 0:
            raise InputError(f"--micro-batch must be at least 0, got {self.micro_batch}")
        if self.share_prompts and self.compiled:
            raise InputError("--share-prompts does nothing in compiled models: leave it out, or --compile")

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[Any]:
        """Yields the pipeline to call; after the block the given one is as it was.

        Raises InputError where something asked for would do nothing, or cannot be done to this pipeline.
        """
        with ExitStack() as stack:
            stack.enter_context(attention_backend(pipe, self.attention))
            if self.share_prompts and not (sharing := stack.enter_context(shared_prompt(pipe))).layers:
                raise InputError(f"--share-prompts: there is nothing to share: {'; '.join(sharing.reasons)}")
            view = stack.enter_context(compiled(pipe)) if self.compiled else pipe
            if self.micro_batch is not None:
                view = stack.enter_context(micro_batched(view, self.micro_batch or None))
            yield view
