"""Hooks on a model: its forwards tell the PagedCache that they are given what they compute.

Where the cache says so, its layers' attention function is the one that reads blocks until they end.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pagedkv.integrations._attention import ATTENTION, attends_paged

__all__ = ["Attached", "attach"]


class Attached(ABC):
    """A cache that the hooks on a model know, when they find it among the inputs of a forward."""

    @abstractmethod
    def _begin_forward(
        self, inputs: dict[str, Any], wants_more: bool
    ) -> tuple[dict[str, Any], bool]:
        """The inputs to compute instead, and whether paged attention is what the layers call.

        `wants_more`: the forward wants more than that has, so that it cannot be.
        """

    @abstractmethod
    def _end_forward(self, output: Any) -> Any:
        """The output to return instead. `output` is None if the forward raised."""


class AttentionSwitch:
    """Sets the attention function of a model's layers, for the length of forwards.

    Several threads may be in a forward of the model: it is put back when none is any more. One that
    was interrupted, so that nobody heard of its end, ends with the next one of its thread. Forwards
    of other caches in other threads see it meanwhile: so the model has to be one of "sdpa", whose
    masks are the same.

    `attends_paged`: whether the layers would ask the one that it sets.
    """

    def __init__(self, model: Any) -> None:
        self.attends_paged = attends_paged(model)
        found = {id(model.config): model.config}
        for module in model.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "config"):
                found[id(module.config)] = module.config
        self._configs = list(found.values())
        self._before: list[str | None] = []
        self._threads: set[int] = set()  # that are in a forward
        self._lock = Lock()

    def on(self) -> None:
        with self._lock:
            if not self._threads:
                self._before = [config._attn_implementation_internal for config in self._configs]
            self._threads.add(get_ident())
            for config in self._configs:
                config._attn_implementation_internal = ATTENTION

    def off(self) -> None:
        if get_ident() not in self._threads:
            return
        with self._lock:
            self._threads.discard(get_ident())
            if self._threads:
                return
            for config, before in zip(self._configs, self._before, strict=True):
                config._attn_implementation_internal = before


_attaching = Lock()
_switches: WeakKeyDictionary[torch.nn.Module, AttentionSwitch] = WeakKeyDictionary()


def attach(model: Any) -> bool:
    """Hook `model`, once, so that its forwards tell a PagedCache their tokens and fold rows.

    Returns whether its layers can attend straight over blocks.
    """
    with _attaching:
        if model not in _switches:
            _switches[model] = AttentionSwitch(model)
            if _before not in model._forward_pre_hooks.values():  # as in a copy of an attached one
                model.register_forward_pre_hook(_before, with_kwargs=True)
                model.register_forward_hook(_after, with_kwargs=True, always_call=True)
        return _switches[model].attends_paged


def _before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    switch = _switches.get(module)
    if switch is None:
        return None
    switch.off()  # of a forward that was interrupted
    args, kwargs = _by_name(module, args, kwargs)
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Attached):
        return None
    kwargs, paged_attention = cache._begin_forward(kwargs, _wants_more(module, kwargs))
    if paged_attention:
        switch.on()
    return args, kwargs


def _after(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    cache, switch = kwargs.get("past_key_values"), _switches.get(module)
    if switch is None or not isinstance(cache, Attached):
        return None
    switch.off()
    return cache._end_forward(output)


def _by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a module's forward, all that can be as keywords: (args, kwargs)."""
    if not args:
        return args, kwargs
    named = {}
    for value, parameter in zip(
        args, inspect.signature(module.forward).parameters.values(), strict=False
    ):
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        named[parameter.name] = value
    if named.keys() & kwargs.keys():
        return args, kwargs  # which the model will refuse
    return args[len(named) :], {**named, **kwargs}


def _wants_more(module: torch.nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a forward wants more than paged attention has: gradients, or its weights."""
    weights = inputs.get("output_attentions")
    if weights is None:
        weights = getattr(module.config, "output_attentions", False)
    return bool(weights) or torch.is_grad_enabled()
