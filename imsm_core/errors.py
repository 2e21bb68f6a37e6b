"""What can go wrong in training, as one tree.

IMSMError                 a user's mistake; the command line prints its one line and exits 2
├── DataError             a data file or row that cannot be trained on
├── BaseModelError        a base model that cannot be loaded, or is not the one that was tuned
├── AdapterError          a PEFT method or adapter that cannot be used
├── CheckpointError       a CHECKPOINT folder that is missing a part or contradicts itself
├── SettingsError         a setting outside its range
├── OutputError           an output folder that cannot be written
└── OutputExistsError     the output folder exists and `force` was not given
"""


class IMSMError(Exception):
    """Base of every error that a user can cause; its message is one line."""


class DataError(IMSMError):
    """A data file or row that cannot be trained on."""


class BaseModelError(IMSMError):
    """A base model that cannot be loaded, or is not the one that was tuned."""


class AdapterError(IMSMError):
    """A PEFT method or adapter that cannot be used."""


class CheckpointError(IMSMError):
    """A CHECKPOINT folder that is missing a part or contradicts itself."""


class SettingsError(IMSMError):
    """A setting outside its range."""


class OutputError(IMSMError):
    """An output folder that cannot be written."""


class OutputExistsError(IMSMError):
    """The output folder exists and `force` was not given."""
