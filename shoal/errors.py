"""Every error a user can meet. Each says three things: what we got, what we expected, how to fix it.

A `ShoalError` is the fault of something outside the code (a flag, a file, a model folder, the machine); the command
line prints it without a trace and exits with `exit_code`. Faults inside the code are plain `assert`s and keep theirs.
"""


class ShoalError(Exception):
    """`got`, `expected` and `fix` are whole clauses, without a full stop."""

    exit_code = 2

    def __init__(self, got: str, expected: str, fix: str):
        super().__init__(got, expected, fix)
        self.got, self.expected, self.fix = got, expected, fix

    def __str__(self) -> str:
        return f"{self.got}\n  expected: {self.expected}\n  fix: {self.fix}"


class ConfigError(ShoalError):
    """An unknown key, a value of the wrong type or out of range, or settings that contradict each other."""


class DataError(ShoalError):
    """A corpus, shard or tokenizer that cannot be used."""


class ModelError(ShoalError):
    """A model folder that is missing, malformed, hostile, or of an architecture we do not know."""


class CheckpointError(ShoalError):
    """A training checkpoint that is damaged or does not belong to what was asked."""


class ResourceError(ShoalError):
    """Not enough memory, disk or threads for what was asked."""

    exit_code = 3


class StorageError(ShoalError):
    """A file that can't be read any more, or that changed, while the model in it is in use."""

    exit_code = 3


class TrainingError(ShoalError):
    """Training cannot go on: the loss stayed non-finite or spiked too many times in a row."""

    exit_code = 4


class SandboxError(ShoalError):
    """No isolation to be had for code that a model wrote; it isn't run with less."""

    exit_code = 3


class RunError(ShoalError):
    """A run directory that is missing, in use by another process, or not what its name says."""


class RequestError(ShoalError):
    """A request for tokens that can't be served as it stands: empty, too long, or with a parameter out of range.

    `param` names the field at fault where there is one, `code` is a short stable word for programs.
    """

    def __init__(self, got: str, expected: str, fix: str, param: str | None = None, code: str = "invalid_request"):
        super().__init__(got, expected, fix)
        self.param, self.code = param, code
