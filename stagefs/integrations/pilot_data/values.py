"""Words of the Pilot-API that everything here shares: states, descriptions, affinity, the error.

A description is a dictionary with BigJob's keys; one of the classes here is the same with
attributes.  Keys that mean nothing here (``queue``, ``project``, ``walltime``) are kept and not
looked at.
"""

from collections.abc import Mapping
from typing import Any

from stagefs.errors import StageFSError

Words = Mapping[str, Any]
"""A description as it is given."""

MEGABYTE = 10**6
DATACENTER, MACHINE = "affinity_datacenter_label", "affinity_machine_label"


class PilotError(StageFSError):
    """What a pilot, a pilot data or a unit cannot do: one sentence with the URL and the reason."""

    def __init__(self, value: str) -> None:
        super().__init__(value)
        self.value = value


class State:
    """Of pilots, pilot datas, data units and compute units."""

    Unknown = "Unknown"
    New = "New"
    Pending = "Pending"
    Running = "Running"
    Done = "Done"
    Canceled = "Canceled"
    Failed = "Failed"


FINAL = frozenset({State.Done, State.Canceled, State.Failed})


class _Description(dict[str, Any]):
    """A dictionary whose keys are attributes, too."""

    def __setattr__(self, name: str, value: object) -> None:
        self[name] = value

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever was put there
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class PilotDataDescription(_Description):
    """``service_url size affinity_* userkey access_key_id secret_access_key region``."""


class DataUnitDescription(_Description):
    """``file_urls number_of_replicas affinity_*``."""


class PilotComputeDescription(_Description):
    """``service_url number_of_processes working_directory affinity_*``."""


class ComputeUnitDescription(_Description):
    """``executable arguments environment working_directory input output error
    number_of_processes input_data output_data replicate_input affinity_*``."""


class Affinity(tuple[str, str]):
    """Where something is: data centre and machine, each empty where nothing was said."""

    __slots__ = ()

    @classmethod
    def of(cls, description: Words) -> "Affinity":
        labels = (str(description.get(key) or "").strip() for key in (DATACENTER, MACHINE))
        return cls(labels)

    @property
    def path(self) -> str:
        """As replicas have it: ``datacenter/machine``."""
        return "/".join(label.replace("/", "_") for label in self if label)

    def closeness(self, other: "Affinity") -> int:
        """How many leading labels both have and share."""
        shared = 0
        for label, theirs in zip(self, other, strict=True):
            if label != theirs:
                break
            shared += bool(label)
        return shared


def positive(description: Words, key: str, default: int = 1) -> int:
    """A number that may be given as text.  Raises PilotError."""
    value = description.get(key, default)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise PilotError(f"{key} is {value!r}: write a number of 1 or more.")
    return number


def checked(description: object, key: str, what: str) -> Words:
    """The description, if it is one and has what it must have.  Raises PilotError."""
    if not isinstance(description, Mapping) or not description.get(key):
        raise PilotError(f"A {what} is described by a dictionary with the key {key!r}.")
    return description
