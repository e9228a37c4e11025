"""Errors a user can cause and mend. Each message is one line that says what was wrong and what to do.

The command line prints the message and exits with code 2; anything that is not a `UserError` is a defect of ours.
"""


class UserError(Exception):
    """Base class: the caller's input, files or machine cannot do what was asked."""


class ConfigError(UserError):
    """A configuration has an unknown key, a missing key or a value that is not supported."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit the model it is loaded into."""


class ImageError(UserError):
    """A picture cannot be read or is refused."""


class PromptError(UserError):
    """A conversation or token sequence does not fit its images or the model's context."""


class DataError(UserError):
    """Training data is missing, damaged, or has too few rows that can be used."""


class DeviceError(UserError):
    """A dtype, device or backend was asked for that is not there."""


class TrainingError(UserError):
    """A training run cannot go on: its loss is not finite, a step teaches nothing or does not fit in memory."""


class MissingExtraError(UserError):
    """An optional dependency is needed that is not installed."""

    def __init__(self, extra: str, needed_for: str) -> None:
        super().__init__(f'{needed_for} needs an optional extra: pip install -e ".[{extra}]"')
        self.extra, self.needed_for = extra, needed_for

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.extra, self.needed_for)  # between processes: else by the message alone
