"""What an edit needs beside the facts, and its refusal where that is missing, before anything is run.

:func:`check_request` asks all that is known without a model, :func:`check_model` what depends on one. The session asks
both, a command the first before it loads a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kecore.api.errors import UnsupportedCapabilityError
from kecore.api.types import EditRequest, check_conflicts, unique

if TYPE_CHECKING:
    from kecore.api.config import MethodConfig
    from kecore.api.line import MethodLine
    from kecore.api.method import EditMethod
    from kecore.model import ModelView

__all__ = [
    "check_count",
    "check_given",
    "check_model",
    "check_request",
    "check_subjects",
    "missing_examples",
    "missing_statistics",
    "missing_training",
    "statistics_layers",
]


def check_request(
    method: type[EditMethod] | MethodLine,
    config: MethodConfig,
    requests: Sequence[EditRequest],
    *,
    trained: bool,
    examples: bool,
) -> None:
    """Refuse an edit for reasons that are known before a model is loaded.

    Args:
        method: the method, as a class or as a line with stages.
        config: its configuration.
        requests: the facts.
        trained: a trained editor of the method is at hand.
        examples: records that demonstrations may be taken from are at hand.

    Raises:
        RequestError: there is no request, or two contradict each other.
        UnsupportedCapabilityError: the method takes one request at a time, was not trained, has no examples, or needs
            a subject that a request does not name.
        MissingDependencyError: the method uses a package that is not installed.
        ModelLoadError: its sentence encoder cannot be loaded.
    """
    check_conflicts(requests)
    check_count(method, requests)
    check_subjects(method, requests)
    check_given(method, trained=trained, examples=examples)
    config.check_installed()


def check_given(method: type[EditMethod] | MethodLine, *, trained: bool, examples: bool) -> None:
    """Refuse a method that needs training or examples where there are none.

    Args:
        method: the method, as a class or as a line with stages.
        trained: a trained editor of the method is at hand.
        examples: records that demonstrations may be taken from are at hand.

    Raises:
        UnsupportedCapabilityError: says how to make or pass what is missing.
    """
    if method.capabilities.needs_training and not trained:
        raise missing_training(method.name)
    if method.capabilities.needs_examples and not examples:
        raise missing_examples(method.name)


def check_model(
    method: type[EditMethod] | MethodLine, config: MethodConfig, view: ModelView, *, statistics: bool, edited: bool
) -> None:
    """Refuse an edit for reasons that depend on the model, before it is run.

    Args:
        method: the method, as a class or as a line with stages.
        config: its configuration.
        view: the model.
        statistics: key statistics are at hand, or a source of them.
        edited: the model carries edits.

    Raises:
        UnsupportedModelError: the method needs more of the model than could be read: its layers, to act beside them, or
            matrices in one of them, to change these.
        UnsupportedCapabilityError: the method does not edit such weights, needs statistics, or does not edit an edited
            model.
    """
    from kecore.api.identity import type_name  # with torch, which finding plugins takes no part of

    capabilities = method.capabilities
    if capabilities.kind != "prompt":
        lowest = view.layer(0)
        if capabilities.kind == "weights" and not view.sites:
            lowest.check_sites()
    dtype = type_name(view.dtype)
    if dtype not in capabilities.dtypes:
        raise UnsupportedCapabilityError(
            f"method '{method.name}' edits {', '.join(capabilities.dtypes)} weights, the model's are {dtype}; "
            "load it in another dtype"
        )
    if edited and not capabilities.sequential:
        way_out = ", or give all requests at once" if capabilities.batch else ""
        raise UnsupportedCapabilityError(f"method '{method.name}' does not edit an edited model; revert first{way_out}")
    if not statistics and statistics_layers(method, config, view):
        raise missing_statistics(method.name)


def check_count(method: type[Any] | MethodLine, requests: Sequence[EditRequest]) -> None:
    """Refuse several requests in one call of a method that neither solves them together nor follows its own edits.

    The session asks this before anything is computed, and such a method's ``plan`` does when it is called directly.

    Raises:
        UnsupportedCapabilityError: names the capability and the ways out.
    """
    capabilities, count = method.capabilities, len(unique(requests))
    if count > 1 and not capabilities.batch and not capabilities.sequential:
        raise UnsupportedCapabilityError(
            f"method '{method.name}' takes one request at a time and {count} came: it has neither the capability "
            "'batch', to solve several together, nor 'sequential', to write one after another; edit one, and revert "
            "before the next (`edits=single` in bench), or choose a method with 'batch' (`kecore methods`)"
        )


def check_subjects(method: type[Any] | MethodLine, requests: Sequence[EditRequest]) -> None:
    """Refuse requests that name no subject, for a method that edits at the subject's tokens.

    Raises:
        UnsupportedCapabilityError: names the requests and the ways out.
    """
    without = [request for request in requests if request.subject is None]
    if not method.capabilities.needs_subject or not without:
        return
    raise UnsupportedCapabilityError(
        f"method '{method.name}' edits at a fact's subject, and {len(without)} of {len(requests)} facts name none, as "
        f"'{without[0].id}' ({without[0].text!r:.80}); add a field 'subject' to each, let "
        "`kecore check FACTS MODEL` propose them, or choose a method that needs none "
        "(`kecore methods` says which)"
    )


def statistics_layers(method: type[EditMethod] | MethodLine, config: MethodConfig, view: ModelView) -> tuple[int, ...]:
    """Return the layers whose key statistics an edit reads; empty for a method that needs none."""
    if not method.capabilities.needs_statistics:
        return ()
    return config.statistics_layers(view)


def missing_statistics(method: str = "") -> UnsupportedCapabilityError:
    """Return the refusal of a method that was asked for without key statistics."""
    who = f"method '{method}'" if method else "this method"
    return UnsupportedCapabilityError(
        f"{who} needs key statistics and none were given; make them with "
        "`kecore stats MODEL --text FILE --out DIR` and pass --stats DIR "
        '(in Python: Editor(model, tokenizer, statistics=DIR), or statistics="auto")'
    )


def missing_training(method: str) -> UnsupportedCapabilityError:
    """Return the refusal of a method that was asked for without training."""
    return UnsupportedCapabilityError(
        f"method '{method}' must be trained first and no trained editor was given; make one with "
        f"`kecore train {method} MODEL --data FILE --out DIR` and pass --trained DIR "
        "(in Python: Editor(model, tokenizer, trained=TrainedEditor.load(DIR)))"
    )


def missing_examples(method: str) -> UnsupportedCapabilityError:
    """Return the refusal of a method that was asked for without examples."""
    return UnsupportedCapabilityError(
        f"method '{method}' takes its demonstrations from a pool of examples and none were given; pass "
        "--examples FILE, facts with paraphrases and neighbours that are not among those to be edited "
        "(in Python: Editor(model, tokenizer, examples=load_records(FILE)))"
    )
