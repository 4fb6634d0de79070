"""Every failure codeherd names, in one tree with stable codes.

Owns: the classes, their codes, whether trying again can help. Does not know: exit codes
(`codeherd_producer.cli`) or what a worker does about a failure (`codeherd_worker.runner`).

    CodeherdError
    ├── InvalidRequest            refused before anything is queued
    │   ├── UnknownModel
    │   ├── UnsupportedByModel
    │   ├── FillMarkerError
    │   ├── ReservedText
    │   ├── PromptTooLong
    │   └── IdempotencyConflict
    ├── ConfigurationError        the process must not start, or not go on
    │   ├── InvalidSetting
    │   ├── SchemaOutdated
    │   ├── ModelFilesInvalid
    │   ├── TokenizerMismatch
    │   ├── DeviceUnavailable
    │   └── PackageMissing
    ├── ServiceUnavailable        something outside did not answer; retryable
    │   ├── DatabaseUnavailable
    │   └── BrokerUnavailable
    ├── GenerationError           a worker could not finish an attempt
    │   ├── OutOfMemory           retryable
    │   ├── EngineFailed          retryable
    │   └── LeaseLost
    ├── JobError                  what a producer is told about one job
    │   ├── JobNotFound
    │   ├── JobFailed             state failed or dead
    │   ├── JobCancelled
    │   ├── JobExpired
    │   ├── WaitTimeout           the job is still alive
    │   └── IllegalMove           the job's state does not allow what was asked
    └── RunNotFound               no run of a backfill has this id
"""

from __future__ import annotations

from typing import ClassVar


class CodeherdError(Exception):
    """Something went wrong in codeherd."""

    #: Stable word for machines: never renamed, safe to compare.
    code: ClassVar[str] = "codeherd_error"
    #: Whether the same call can succeed later without a change.
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        """Make the error.

        Args:
            message: one sentence with the figures, no prompt text and no secret; the class
                docstring's first line when left out.
            hint: what the reader can do about it.
        """
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0].rstrip(".")
        self.hint = hint
        super().__init__(self.message)


class InvalidRequest(CodeherdError):
    """The request can never run as it is."""

    code = "invalid_request"


class UnknownModel(InvalidRequest):
    """No such model is in the model table."""

    code = "model_not_found"


class UnsupportedByModel(InvalidRequest):
    """The model cannot do this kind of job."""

    code = "unsupported_by_model"


class FillMarkerError(InvalidRequest):
    """The text must hold exactly one fill marker."""

    code = "fill_marker"


class ReservedText(InvalidRequest):
    """A chat message holds the chat format's own control text."""

    code = "reserved_text"


class PromptTooLong(InvalidRequest):
    """The prompt and the new tokens do not fit the model's context window."""

    code = "context_length_exceeded"


class IdempotencyConflict(InvalidRequest):
    """The idempotency key was used before with a different request."""

    code = "idempotency_conflict"


class ConfigurationError(CodeherdError):
    """The configuration cannot work."""

    code = "configuration"


class InvalidSetting(ConfigurationError):
    """A setting is unknown or its value is impossible."""

    code = "invalid_setting"


class SchemaOutdated(ConfigurationError):
    """The database schema is not the one this version needs."""

    code = "schema_outdated"


class ModelFilesInvalid(ConfigurationError):
    """The model folder is missing, incomplete or corrupt."""

    code = "model_files_invalid"


class TokenizerMismatch(ConfigurationError):
    """The tokenizer does not produce the published ids of its vocabulary."""

    code = "tokenizer_mismatch"


class DeviceUnavailable(ConfigurationError):
    """The device that was asked for is not there."""

    code = "device_unavailable"


class PackageMissing(ConfigurationError):
    """A package that the setting or the model needs is not installed."""

    code = "package_missing"


class ServiceUnavailable(CodeherdError):
    """A service that codeherd needs did not answer."""

    code = "service_unavailable"
    retryable = True


class DatabaseUnavailable(ServiceUnavailable):
    """The database did not answer."""

    code = "database_unavailable"


class BrokerUnavailable(ServiceUnavailable):
    """The broker did not answer."""

    code = "broker_unavailable"


class GenerationError(CodeherdError):
    """The attempt could not be finished."""

    code = "generation_failed"


class OutOfMemory(GenerationError):
    """The device ran out of memory."""

    code = "out_of_memory"
    retryable = True


class EngineFailed(GenerationError):
    """The engine broke while it generated."""

    code = "engine_failed"
    retryable = True


class LeaseLost(GenerationError):
    """Another worker owns the job now; nothing of this attempt may be stored."""

    code = "lease_lost"


class JobError(CodeherdError):
    """The job has no result to give."""

    code = "job_error"


class JobNotFound(JobError):
    """No job has this id."""

    code = "job_not_found"


class JobFailed(JobError):
    """The job ended without a result."""

    code = "job_failed"


class JobCancelled(JobError):
    """The job was cancelled."""

    code = "job_cancelled"


class JobExpired(JobError):
    """The job passed its deadline or its latest start."""

    code = "job_expired"


class WaitTimeout(JobError):
    """The wait ended before the job did; the job goes on."""

    code = "wait_timeout"
    retryable = True


class IllegalMove(JobError):
    """The job's state does not allow this."""

    code = "illegal_move"


class RunNotFound(CodeherdError):
    """No run has this id."""

    code = "run_not_found"
