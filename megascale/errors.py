"""The few errors a user can cause, each with the exit code its job ends with."""


class MegascaleError(Exception):
    """A mistake outside the code: one line that names the file or key; the job exits with `exit_code`."""

    exit_code = 2
    on_every_rank = False  # whether rank 0 meets it as well, so that one line is enough
    of_own_device = False  # whether it is about this rank's GPU, so that no other may meet it


class ConfigError(MegascaleError):
    """An unknown key, a bad value, or settings that contradict each other."""

    on_every_rank = True


class FolderInUse(ConfigError):
    """Another process is at work in a run's folder; it may end."""


class StorageError(MegascaleError):
    """A URL that cannot be read or written."""


class CredentialsError(StorageError):
    """A store does not take the credentials, whatever is asked of it."""


class StoreUnavailable(StorageError):
    """A store that did not answer as it should, however often it was asked: what it holds is not known."""


class AudioError(MegascaleError):
    """A recording that cannot become a clip; tokenization quarantines it and goes on."""


class TokenError(MegascaleError):
    """An `.ecdc` stream that is broken or was written by another codec."""


class DataError(MegascaleError):
    """A token folder, or its labels, that cannot be used for what was asked."""


class CheckpointError(MegascaleError):
    """A checkpoint that is incomplete, changed on disk, or does not fit the model."""


class QuarantineExceeded(MegascaleError):
    """The job is finished, but more clips were quarantined than the config allows."""

    exit_code = 3


class TrainingDiverged(MegascaleError):
    """A loss or gradient is NaN or infinite; the weights are those before that step."""

    exit_code = 4
    on_every_rank = True


class Stopped(MegascaleError):
    """SIGTERM came: everything is saved, and the same command goes on from there."""

    exit_code = 75
    on_every_rank = True
    together = False  # whether the ranks agreed to stop at this point, so that each is there
