"""What can go wrong between here and the hub, in a user's words?

Left out: what to do instead, which whoever asked knows.
"""

from __future__ import annotations

from megatron_powerflow.hub.names import HubName

MAX_CHARACTERS = 200
KINDS = {"model": "model", "dataset": "data set"}


def failures() -> tuple[type[Exception], ...]:
    """Everything that huggingface_hub raises for a network, a server, a disk or a cache; the rest is a bug."""
    from huggingface_hub import errors

    xet = getattr(errors, "XetDownloadError", OSError)  # huggingface_hub 2
    return OSError, ValueError, RuntimeError, errors.HTTPError, errors.EntryNotFoundError, xet


def answered(error: Exception) -> bool:
    """Whether a hub said so, and not the network in between."""
    from huggingface_hub import errors

    return isinstance(error, errors.HfHubHTTPError)


def reason_of(error: Exception, name: HubName) -> str:
    """Why the hub did not say which commit a name stands for."""
    from huggingface_hub import constants, errors

    hub, what = constants.ENDPOINT, KINDS[name.kind]
    if isinstance(error, errors.GatedRepoError):
        return f"its owner asks for consent; agree at {hub}/{name.id} and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub} shows no {what} {name.repository}; mend the name, or log in with `hf auth login` if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the {what} {name.repository} has no branch, tag or commit {name.revision}"
    return f"{hub} could not be asked for it ({one_line(error)})"


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MAX_CHARACTERS]}" if text else type(error).__name__


def quiet(*, bars: bool = True) -> None:
    """huggingface_hub's warnings stay off the screen: we say what goes wrong. bars: whether a download shows one."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not bars:
        disable_progress_bars()
