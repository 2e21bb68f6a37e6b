"""What can go wrong in an export, as one branch of the tree in `imsm_core.errors`.

IMSMError
├── SettingsError             a setting outside its range, or one that contradicts another
└── ExportError
    ├── UnsupportedError      an architecture or PEFT variant that has no two-stream form
    ├── TraceError            the traced graph is not what the exporter relies on
    └── VerificationError     the exported graph does not compute what PyTorch computes; nothing is published

A message names a setting as a placeholder, such as {context_length}: see `IMSMError.told`.
"""

from imsm_core.errors import IMSMError


class ExportError(IMSMError):
    """Base of every error of an export."""


class UnsupportedError(ExportError):
    """An architecture or PEFT variant that has no two-stream form."""


class TraceError(ExportError):
    """The traced graph is not what the exporter relies on."""


class VerificationError(ExportError):
    """The exported graph does not compute what PyTorch computes."""

    exit_code = 1  # a check that failed
