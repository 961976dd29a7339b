"""What goes wrong with checkpoints."""

import contextlib
from collections.abc import Iterator

RECOVER = "restore its folder from a copy, or delete it to go on from an older step"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another shape, or cannot be written; one line."""


@contextlib.contextmanager
def as_checkpoint_error(what: str, fix: str) -> Iterator[None]:
    """Turns whatever orbax, tensorstore and the file system raise into a CheckpointError: what, why, fix."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # ValueError, KeyError, OSError, RuntimeError, ...
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(f"{what} ({type(error).__name__}: {reason}); {fix}") from error
