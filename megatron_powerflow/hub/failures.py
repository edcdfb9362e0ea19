"""What can go wrong between this machine and the hub, in a user's words?

Left out: what the user can do instead, which depends on the command (`RequestedName.instead`).
"""

from __future__ import annotations

from megatron_powerflow.hub.names import HubName

MAX_CHARACTERS = 200
KINDS = {"model": "model", "dataset": "data set"}


def hub_errors() -> tuple[type[Exception], ...]:
    """Returns what huggingface_hub raises for a network, a server, a disk or a cache; anything else is a bug."""
    from huggingface_hub import errors

    xet = getattr(errors, "XetDownloadError", OSError)  # huggingface_hub 2
    return OSError, ValueError, RuntimeError, errors.HTTPError, errors.EntryNotFoundError, xet


def is_hub_reply(error: Exception) -> bool:
    """Whether the error is a reply of the hub, and not a failure of the network in between."""
    from huggingface_hub import errors

    return isinstance(error, errors.HfHubHTTPError)


def reason_of(error: Exception, name: HubName) -> str:
    """Returns, for a message, why the hub did not say which commit a name stands for."""
    from huggingface_hub import constants, errors

    hub, kind = constants.ENDPOINT, KINDS[name.kind]
    if isinstance(error, errors.GatedRepoError):
        return f"its owner asks for consent; agree at {hub}/{name.id} and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub} shows no {kind} {name.repository}; mend the name, or log in with `hf auth login` if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the {kind} {name.repository} has no branch, tag or commit {name.revision}"
    return f"{hub} could not be asked for it ({one_line(error)})"


def one_line(error: Exception) -> str:
    """Returns the error's class and its text on one line, cut after MAX_CHARACTERS."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MAX_CHARACTERS]}" if text else type(error).__name__


def silence_hub(*, bars: bool = True) -> None:
    """Turns off huggingface_hub's warnings, since our messages say what goes wrong.

    bars: whether a download may show its progress bar.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not bars:
        disable_progress_bars()
