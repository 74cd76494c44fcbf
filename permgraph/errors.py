"""Every exception that a user of permgraph can meet."""


class PermgraphError(Exception):
    """Base class: whatever permgraph refuses, it refuses with a subclass of this."""


class CaptureError(PermgraphError):
    """The model could not be run, or no example input for it was found."""


class NoInputsError(CaptureError):
    """No example input with which the model runs was found; the message lists what was tried."""


class SpecError(PermgraphError, ValueError):
    """A specification is malformed, or contradicts itself."""


class MismatchError(PermgraphError, ValueError):
    """A state dict, model or permutation does not fit the specification, or two models do not fit each other."""


class NonFiniteError(PermgraphError, ValueError):
    """A tensor holds NaN or infinity where finite values are needed."""


class ConflictError(PermgraphError, RuntimeError):
    """Two axes of different sizes were tied: a bug in an operator's rule, not in the model."""


class EvaluationError(PermgraphError, ValueError):
    """A network cannot be measured as asked: an empty loader, a model in training mode, metrics that do not fit."""


class CheckpointError(PermgraphError, ValueError):
    """A checkpoint is damaged, unsafe or of an unknown layout, or cannot be written where it was asked for."""


class StudyError(PermgraphError, ValueError):
    """A study cannot be run as planned: its plan, its store or its workers are not what they should be."""


class MissingExtraError(PermgraphError, ImportError):
    """An optional dependency is not installed; the message says which extra brings it."""


def in_one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says, on one line, cut after so many characters; the name of its kind if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__
