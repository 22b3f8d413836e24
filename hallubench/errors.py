"""What can go wrong, as a tree.

    HallubenchError
    ├── InputError            the user's files or options are wrong          exit code 2
    │   ├── ConfigError       ... the config
    │   ├── PromptError       ... the prompts file
    │   ├── ResultError       ... a file of results to import
    │   ├── AnnotationError   ... a file of annotations
    │   └── StoreError        ... the output folder
    └── RunError              the run could not finish                       exit code 1
        ├── LaneError         ... one lane stopped; its requests stay pending
        │   └── EngineDied    ... its engine did; another one may go on
        └── DiskError         ... answers can no longer be written

Every message is one line that names the file, key or line, and the fix. Exceptions of SDKs and of
the engine never leave their provider: they become a `Completion` with `error` set, or a `LaneError`.
"""


class HallubenchError(Exception):
    """Base of everything hallubench raises on purpose."""

    exit_code = 1


class InputError(HallubenchError):
    """The user's input is wrong: nothing was asked, nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """The config cannot be read, or asks for something that cannot be had."""


class PromptError(InputError):
    """The prompts file cannot be read, or one of its prompts cannot be asked."""


class ResultError(InputError):
    """A file of results cannot be read, or holds what is no result; nothing was imported."""


class AnnotationError(InputError):
    """A file of annotations cannot be read, or does not fit the answers of the store."""


class StoreError(InputError):
    """The output folder cannot be used: not ours, not writable, or another run writes it."""


class RunError(HallubenchError):
    """The run began and could not finish. What was answered is on disk."""


class LaneError(RunError):
    """One lane cannot go on (bad key, unknown model, dead engine). Its open requests stay pending."""


class EngineDied(LaneError):  # noqa: N818 - what happened says more than "EngineDeathError"
    """A loaded engine died. A lane goes on with another one, once."""


class DiskError(RunError):
    """Answers can no longer be written (disk full, quota, read-only). What was written is whole."""
