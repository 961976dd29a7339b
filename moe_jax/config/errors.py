"""What a user gets to read when a config is refused: field, value, what is allowed, the fix."""

import difflib
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass


class _ShortRepr(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel = 3


@dataclass(frozen=True)
class Problem:
    """One reason to refuse a config."""

    field: str
    """Dotted name, as on the command line without its dashes: ``model.top_k``."""
    value: object
    """What the field was given."""
    allowed: str
    """What it may hold, as the rest of a sentence: ``must be at most ...``."""
    fix: str = ""
    """What to do about it: ``use 16``."""
    source: str = ""
    """Where the value came from: a file, ``command line`` or nothing."""

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        fix = f"; {self.fix}" if self.fix else ""
        # In files and in from_dict's input, what a tuple holds is a list.
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return one_line(f"{self.field} = {_ShortRepr().repr(value)}{source}: {self.allowed}{fix}")


class ConfigError(ValueError):
    """A config, a command line or a machine that cannot do what was asked; the message is one line.

    ``str(error)`` is the first problem, and how many more there are and in which fields; ``problems`` holds
    them all (a plain sentence stays a string).
    """

    def __init__(self, *problems: Problem | str):
        assert problems, "an error without a problem"
        self.problems = problems
        super().__init__(*problems)

    def __str__(self) -> str:
        first, *others = self.problems
        line = one_line(str(first))
        if not others:
            return line
        names = list(dict.fromkeys(p.field if isinstance(p, Problem) else one_line(p) for p in others))
        dots = ", ..." if len(names) > 5 else ""
        return f"{line} (and {len(others)} more in {', '.join(names[:5])}{dots})"


def one_line(text: str) -> str:
    """`text` with every line break, and the white space around it, as one space."""
    return " ".join(line.strip() for line in text.splitlines())


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """``did you mean X?`` for the dotted option nearest to `name`, or an empty string if none is near.

    Only last parts are compared, so a name without its section, or in the wrong one, finds its field; ``lr``
    finds learning_rate by its initials.
    """
    by_last: dict[str, str] = {}
    for option in options:
        last = option.rpartition(".")[2]
        by_last.setdefault(last, option)
        by_last.setdefault("".join(word[0] for word in re.split("[_-]", last) if word), option)
    near = difflib.get_close_matches(name.lower().rpartition(".")[2], list(by_last), n=1, cutoff=0.65)
    return f"did you mean {by_last[near[0]]}?" if near else ""
