"""What can go wrong at run time, as one tree.

IMSMRuntimeError          a user's mistake; the command line prints its one line and exits 2
├── ArtifactError         an ARTIFACT folder that is incomplete, damaged, or contradicts itself
├── PromptError           a prompt that is empty or longer than the context
├── ProviderError         an execution provider that is unknown or not in use
└── SettingsError         a sampling or generation setting outside its range
"""


class IMSMRuntimeError(Exception):
    """Base of every error that a user can cause; its message is one line."""


class ArtifactError(IMSMRuntimeError):
    """An ARTIFACT folder that is incomplete, damaged, or contradicts itself."""


class PromptError(IMSMRuntimeError):
    """A prompt that is empty or longer than the context."""


class ProviderError(IMSMRuntimeError):
    """An execution provider that is unknown or not in use."""


class SettingsError(IMSMRuntimeError):
    """A sampling or generation setting outside its range."""
