"""apply: put methods on a model, and take them off again without a trace."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from foveate import compat
from foveate.cache import FoveateCache
from foveate.engine.binding import Binding
from foveate.engine.call import Call
from foveate.engine.captured import Forward
from foveate.engine.correction import keep_correct
from foveate.engine.forward import attention
from foveate.engine.tuned import is_file, read_tuned
from foveate.errors import BadArgument, Refused
from foveate.methods.base import METHODS, Composition, Method, Profile
from foveate.methods.budget import Budget
from foveate.methods.profile import built_in_profile, load_profile, to_json
from foveate.models.shape import ModelShape

CONFIG_KEY = "foveate"
PROFILE_FILE = "foveate_profiles.json"

MethodLike = str | os.PathLike[str] | Method | Composition
ProfileLike = Profile | str | Path | Sequence["Profile | str | Path"] | Mapping[str, "Profile | str | Path"]

compat.register(attention)


def compose(method: MethodLike, budget: Budget | float | int | str | None = None, **settings: Any) -> Composition:
    """A composition from a name ("snapkv", "snapkv|kivi"), a tuned file, a method or a composition.

    Args:
        budget: given to the one method that has none.
        settings: parameters of a method named by a text without `|`.

    Raises:
        BadArgument: unknown name or parameter, clash of slots, budget without a taker.
    """
    if is_file(method):
        if settings or budget is not None:
            given = ("budget", budget) if budget is not None else ("settings", settings)
            raise BadArgument(*given, f"{method} holds them already; change the file, or tune again")
        return read_tuned(method).composition  # type: ignore[arg-type]
    if isinstance(method, str):
        names = [name.strip() for name in method.split("|")]
        if settings and len(names) > 1:
            raise BadArgument("settings", settings, "give parameters to one method, not to a composition")
        made = Composition(tuple(named(name, settings) for name in names))
    elif settings:
        raise BadArgument("settings", settings, "give parameters when the method is made, or name it by a text")
    elif isinstance(method, Method):
        made = Composition((method,))
    elif isinstance(method, Composition):
        made = method
    else:
        raise BadArgument("method", method, "give a name, a tuned file, a method or a composition (A | B)")
    return made.with_budget(Budget.of(budget))


def named(name: str, settings: Mapping[str, Any]) -> Method:
    """A method by its id and parameters, with clear errors for either."""
    if name not in METHODS:
        raise BadArgument("method", name, f"known methods: {', '.join(sorted(METHODS))}")
    try:
        return METHODS[name](**settings)
    except TypeError:
        known = ", ".join(METHODS[name].__dataclass_fields__)
        raise BadArgument("settings", dict(settings), f"{name} has the parameters {known}") from None


class Handle:
    """An applied composition. Leave it by `remove()`, or use it as a context manager.

    Attributes:
        model: the model it is applied to.
        binding: the methods bound to it.
    """

    def __init__(self, model: nn.Module, composition: Composition, profiles: Mapping[str, Profile]) -> None:
        self.model, self.active = model, False
        self.binding = Binding(model, composition, profiles, self)
        self._undo: list[Callable[[], None]] = []

    @classmethod
    def of(cls, model: nn.Module) -> Handle | None:
        """The handle of the methods that are applied to a model now, or None."""
        stack = compat.unwrap(model).__dict__.get("_foveate_stack")
        return stack[-1] if stack else None

    @property
    def id(self) -> str:
        return self.binding.id

    def cache(self) -> FoveateCache:
        """An empty cache under these methods, for forwards and generate() calls of your own."""
        return self.binding.cache()

    def bind(self, method: MethodLike, *, budget: Any = None, profile: ProfileLike | None = None) -> Binding:
        """Another composition on the same applied model: caches made by it (`binding.cache()`) follow it.

        Several methods can so work side by side on one model; each cache knows its own.
        """
        composition, profiles = resolve(method, self.binding.shape, budget, profile)
        return Binding(self.model, composition, profiles, self)

    def install(self) -> None:
        stack = self.model.__dict__.setdefault("_foveate_stack", [])
        if stack:
            stack[-1]._pause()
        stack.append(self)
        self._start()

    def _start(self) -> None:
        _, restore = compat.private_config(self.model)
        self._undo.append(restore)
        hook = compat.base_model(self.model).register_forward_pre_hook(PreHook(self), with_kwargs=True)
        self._undo.append(hook.remove)
        wrappers = [("_prepare_cache_for_generation", PrepareCache), ("save_pretrained", SavePretrained)]
        if next(self.model.parameters()).device.type == "cuda":
            wrappers.append(("forward", Forward))
        for name, wrapper in wrappers:
            if hasattr(self.model, name):
                before = self.model.__dict__.get(name, _ABSENT)
                self.model.__dict__[name] = wrapper(self, getattr(self.model, name))
                self._undo.append(Restore(self.model, name, before))
        self.active = True

    def _pause(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.active = False

    def remove(self) -> None:
        """Restore the model: the same modules, hooks and configuration objects as before."""
        stack = self.model.__dict__.get("_foveate_stack", [])
        if self not in stack:
            return
        top = stack[-1] is self
        stack.remove(self)
        if top:
            self._pause()
            if stack:
                stack[-1]._start()
        if not stack:
            self.model.__dict__.pop("_foveate_stack", None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def state(self) -> dict[str, Any]:
        """Methods and settings as JSON values, as `save_pretrained` writes them."""
        methods = [{"id": m.id, "settings": m.settings()} for m in self.binding.composition.methods]
        return {"version": 1, "methods": methods, "profiles": PROFILE_FILE if self.binding.profiles else None}


_ABSENT = object()


class Restore:
    """Put an instance attribute back, or take it away."""

    def __init__(self, model: nn.Module, name: str, before: Any) -> None:
        self.model, self.name, self.before = model, name, before

    def __call__(self) -> None:
        if self.before is _ABSENT:
            self.model.__dict__.pop(self.name, None)
        else:
            self.model.__dict__[self.name] = self.before


class PreHook:
    """Runs before the decoder: announces the call to every layer through one keyword."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict]:
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", True)
        if cache is None and use_cache and not module.training:
            cache = kwargs["past_key_values"] = self.handle.cache()
        if cache is not None and not isinstance(cache, FoveateCache):
            raise Refused(
                f"a {type(cache).__name__} was passed to a model with {self.handle.id} applied; "
                "pass none, or one made by handle.cache()"
            )
        if kwargs.get(compat.KEYWORD) is not None:
            return args, kwargs  # a correction, which brings its call
        inputs = kwargs.get("input_ids")
        name = "inputs_embeds" if inputs is None and not args else "input_ids"
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        inputs = args[0] if inputs is None and args else inputs
        if inputs is None:
            return args, kwargs
        binding = self.handle.binding if cache is None else cache.owner
        if cache is not None and not binding.active:
            raise Refused("this cache belongs to a model on which Foveate is not applied (any more); make a new one")
        if cache is not None and compat.base_model(binding.model) is not module:
            raise Refused("this cache holds the keys of another model; make one by the handle of this model")
        if cache is not None and cache.recording is not None:
            kwargs[compat.KEYWORD] = cache.recording
            return args, kwargs
        call = kwargs[compat.KEYWORD] = Call(binding, cache, int(inputs.shape[1]))
        if cache is not None and binding.corrects:
            keep_correct(module, call, name, inputs, {k: v for k, v in kwargs.items() if k != compat.KEYWORD})
        return args, kwargs


class PrepareCache:
    """generate()'s cache preparation: gives it our cache and announces the prompt."""

    def __init__(self, handle: Handle, original: Callable[..., Any]) -> None:
        self.handle, self.original = handle, original

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        chosen = getattr(generation_config, "cache_implementation", None)
        cache = model_kwargs.get("past_key_values")
        made = False
        if cache is None and generation_config.use_cache is not False:
            if chosen not in (None, "dynamic"):
                raise BadArgument(
                    "cache_implementation",
                    chosen,
                    f"with {self.handle.id} applied the cache is Foveate's; leave it out",
                )
            cache = model_kwargs["past_key_values"] = self.handle.cache()
            made = True
        result = self.original(generation_config, model_kwargs, *args, **kwargs)
        if not isinstance(cache, FoveateCache):
            return result
        assists = bool(getattr(generation_config, "is_assistant", False))
        if made:
            cache._is_user_defined = False
            if assists:
                cache.activate_past_recording()
        target = compat.prompt_columns(generation_config, model_kwargs)
        seen = cache.get_seq_length()
        if target is None:
            inputs = model_kwargs.get("inputs_embeds")
            target = seen + 1 if inputs is None else int(inputs.shape[1])
        first = not cache.managed or not any(layer.record_past for layer in cache.couriers())
        if first or not assists:
            # An assistant whose first proposal is rejected whole takes back the prompt's last token as well.
            cache.expect(max(0, target - seen - assists))
        cache.horizon = int(getattr(generation_config, "max_length", 0) or 0)
        return result


class SavePretrained:
    """model.save_pretrained of an applied model: methods and profiles travel with the checkpoint."""

    def __init__(self, handle: Handle, original: Callable[..., Any]) -> None:
        self.handle, self.original = handle, original

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.handle.model.config
        setattr(config, CONFIG_KEY, self.handle.state())
        try:
            result = self.original(save_directory, *args, **kwargs)
        finally:
            delattr(config, CONFIG_KEY)
        profiles = {name: to_json(p) for name, p in self.handle.binding.profiles.items()}
        if profiles:
            (Path(save_directory) / PROFILE_FILE).write_text(json.dumps(profiles))
        return result


def find_profiles(composition: Composition, shape: ModelShape, given: ProfileLike | None = None) -> dict[str, Profile]:
    """Profiles of the composition's methods: the given ones, else those that ship for this model.

    Raises:
        BadArgument: if a method needs a profile and there is none, or one was given that nobody takes.
    """
    if given is None:
        items: list[Any] = []
    elif isinstance(given, Mapping):
        items = list(given.values())
    else:
        items = list(given) if isinstance(given, list | tuple) else [given]
    loaded = [p if isinstance(p, Profile) else load_profile(p) for p in items]
    found = {p.method: p for p in loaded}
    ids = {m.id for m in composition.methods}
    for name in found:
        if name not in ids:
            raise BadArgument("profile", name, f"no method of {composition.id} takes it")
    for method in composition.methods:
        if method.needs_profile and method.id not in found:
            shipped = built_in_profile(method.id, shape)
            if shipped is None:
                raise BadArgument(
                    "profile", None, f"{method.id} needs a profile of this model: run `foveate calibrate` first"
                )
            found[method.id] = shipped
    return found


def resolve(
    method: MethodLike, shape: ModelShape, budget: Any = None, profile: ProfileLike | None = None, **settings: Any
) -> tuple[Composition, dict[str, Profile]]:
    """What is asked for on a model of this shape: the methods, and the profiles that they need.

    Raises:
        BadArgument: as `compose` and `find_profiles`; or a tuned file that is for another model.
    """
    composition = compose(method, budget, **settings)
    if is_file(method):
        tuned = read_tuned(method)  # type: ignore[arg-type]
        tuned.check(shape, method)  # type: ignore[arg-type]
        profile = list(tuned.profiles) if profile is None else profile
    return composition, find_profiles(composition, shape, profile)


def apply(
    model: nn.Module,
    method: MethodLike,
    *,
    budget: Budget | float | int | str | None = None,
    profile: ProfileLike | None = None,
    **settings: Any,
) -> Handle:
    """Apply a method, or a composition, to a model that generates text.

    The same model object then reads and holds what the method says, in plain forwards and in `generate()`; only this
    instance changes. Use the result as a context manager, or keep it and call `remove()`; either restores the model
    exactly. Applying again puts the new methods in place until they are removed.

    Args:
        model: a transformers decoder-only model (a PEFT wrapper is unwrapped).
        method: a name ("snapkv", "snapkv|kivi"), a method (`SnapKV(window=16)`), a composition (`A | B`), or the path
            of a tuned file (`foveate tune`), which holds settings, budget and profiles.
        budget: 0.25 is a ratio of the dense cache or pairs, 1024 tokens per head, `Budget` the rest.
        profile: calibration of the methods that need one; default: what ships for this model.
        settings: parameters of a method given by name.

    Raises:
        BadArgument: unknown method or parameter, clash of slots, bad budget, missing or foreign profile.
        Refused: the model or its architecture cannot take the method.
        Infeasible: no prompt within the model's positions can meet the budget.

    Example:
        >>> with foveate.apply(model, "snapkv", budget=0.25):
        ...     model.generate(**inputs)
    """
    inner = compat.unwrap(model)
    compat.check_model(inner)
    composition, profiles = resolve(method, ModelShape.of(inner), budget, profile, **settings)
    handle = Handle(inner, composition, profiles)
    handle.install()
    return handle
