"""The errors of this package: each message says what is wrong, where, and what to do about it."""


class SSRError(ValueError):
    """Base of every error raised on purpose; its text is meant for the person who runs the merge."""


class LoraError(SSRError):
    """A LoRA (file, state dict or update) cannot be used."""


class ModelMismatchError(SSRError):
    """A LoRA does not fit the model it is used with."""


class StatisticsError(SSRError):
    """Statistics are absent, not finite, or were measured with other LoRAs."""


class SolveError(SSRError):
    """The normal equations of a site have no usable solution."""


class SaveError(SSRError, OSError):
    """A file cannot be written."""
