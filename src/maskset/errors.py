"""Errors that a user can cause. The command line reports them in one line; any other exception is a bug in maskset."""


class MasksetError(ValueError):
    """An error that the caller can correct. The message says what was received, what is allowed, and what to do next."""


class ConfigError(MasksetError):
    """A setting does not exist, has the wrong type, or contradicts another one."""


class DataError(MasksetError):
    """A data file cannot be used. The message names the file, the image or the annotation."""


class SourceError(MasksetError):
    """The source of a prediction does not exist, contains no image, or is not an image."""


class MaskError(MasksetError):
    """A mask's run lengths or polygons are not valid."""


class CheckpointError(MasksetError):
    """A checkpoint does not exist or cannot be used."""


class ConversionError(MasksetError):
    """Weights of another project do not fit the system that they are converted for."""


class MatchingError(MasksetError):
    """Predictions cannot be matched to targets, for example because they are not finite."""


class AttentionError(MasksetError):
    """The inputs of deformable attention do not fit together, or its chosen implementation is not available."""


class ResourceError(MasksetError):
    """The machine lacks memory or shared memory, or a process that reads images was killed. The message names a remedy."""


class TrainingDiverged(MasksetError):
    """The loss or the gradient is no longer finite."""


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: a KeyboardInterrupt, because work ends as it does after Ctrl-C, with another exit code."""
