"""Settings of a sampling run: the settings that all methods share, and the method's own.

The options of `steer sample` and `steer evaluate`, report.json, the recipe inside a PNG and the demo's fields are
derived from `SamplingConfig` and from the dataclasses of `steer.pipelines.settings`. Nothing heavy is imported.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from steer.arguments import Settings, option, plain_kinds
from steer.errors import InputError
from steer.pipelines.settings import (
    BestOfNSettings,
    CallSettings,
    DraftsSettings,
    FKSettings,
    MapElitesSettings,
    NoiseSearchSettings,
    RacingSettings,
    RenoiseSettings,
    ReNOSettings,
    SelectionSettings,
)
from steer.registry import choose, did_you_mean


class MethodOptions(NamedTuple):
    """The settings dataclass of a method, defaults that replace the dataclass's, and fields that the method lacks."""

    settings: type[CallSettings]
    defaults: Mapping[str, Any] = {}
    without: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The options of the method."""
        return [name for name in self.settings.saved() if name not in self.without]


METHOD_OPTIONS = {
    "fk": MethodOptions(FKSettings),
    "svdd": MethodOptions(SelectionSettings, without=("beams",)),
    "beam": MethodOptions(SelectionSettings, {"beams": 2}, without=("lam",)),
    "race": MethodOptions(RacingSettings),
    "drafts": MethodOptions(DraftsSettings),
    "renoise": MethodOptions(RenoiseSettings),
    "best-of-n": MethodOptions(BestOfNSettings),
    "base": MethodOptions(BestOfNSettings),
    "reno": MethodOptions(ReNOSettings),
    "noise-search": MethodOptions(NoiseSearchSettings),
    "map-elites": MethodOptions(MapElitesSettings),
}
PURPOSES = {"picture": "race", "samples": "fk"}  # the best picture, by search; draws from p(x0) exp(λ r(x0))
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """All settings that decide the images; saved in the report, and compared when a run resumes.

    model             embedded model, folder, .safetensors file, or ORGANISATION/NAME
    variant           variant of the model's weights, such as fp16; by default none, or the folder's only variant
    model_config      for a single file: folder of such a model in diffusers' format
    method            steering method: fk, svdd, beam, race, drafts, renoise, best-of-n, base, reno (for one-step
                      models, like scenes-turbo), noise-search or map-elites; by default fk, for `steer sample` that of
                      its purpose
    vae               autoencoder that replaces the model's own: a folder, .safetensors file, or ORGANISATION/NAME
    scheduler         solver that replaces the model's own: NAME[:OPTION=VALUE,…], such as euler-a or
                      dpm++:use_karras_sigmas=true
    lora              LoRA adapters to load, RUN/final or a LoRA file, with a weight each: FILE:0.7 + RUN/final
    expand            text model that continues each prompt before it is sampled; the reward reads the original
    reward            NAME[:ARGUMENT], a sum like hpsv2.1:5 + imagereward:1, a folder or a YAML file; `steer rewards`
                      lists names
    particles         K, images for each prompt; by default the method's own: 12 starts of race, 1 search of reno and
                      noise-search, else 4
    steps             solver steps; by default the pipeline's own number, for reno 1
    guidance          guidance scale; by default the pipeline's own, for reno 0
    negative_prompt   content to avoid in the images, for pipelines that take a negative prompt
    height            height of the images in pixels; by default the model's own
    width             width of the images in pixels; by default the model's own
    call              any other argument of the pipeline's call, NAME=VALUE; repeatable
    eta               noise of every step, 0 to 1; by default the solver's own, for svdd and beam 1
    original          with expand: share of the original prompt in the guidance, 0 to 1; the rest belongs to the
                      expanded prompt, and each denoiser evaluation is made for both
    noise_candidates  starting noises of each prompt, from which short runs select the best K
    screening_steps   with noise_candidates: solver steps of the short runs
    seed              random seed, the same for each prompt
    compare           also make the base images of the same seed, for grid.png
    best_of           with compare: also make this many base images and show the best, as a control of equal cost
    dtype             precision: float32, float16 or bfloat16; by default float32 on the CPU, bfloat16 elsewhere
    options           settings of the method, or values by name
    """

    model: str = option("scenes")
    variant: str | None = option(None)
    model_config: str | None = option(None, flags=("--config",))
    method: str = option("fk", choices=tuple(METHOD_OPTIONS))
    vae: str | None = option(None)
    scheduler: str | None = option(None)
    lora: str | None = option(None)
    expand: str | None = option(None)
    original: float | None = option(None, "[0, 1]")
    reward: str = option("scene-soft")
    particles: int = option(None, "[1, inf]", flags=("--particles", "--seeds"), slider=(1, 16, 1))  # int after init
    steps: int | None = option(None, "[1, inf]", slider=(1, 100, 1))
    guidance: float | None = option(None, "(-inf, inf)", slider=(0, 30, 0.5))
    negative_prompt: str | None = option(None)
    height: int | None = option(None, "[1, inf]")
    width: int | None = option(None, "[1, inf]")
    call: str | None = option(None)
    eta: float | None = option(None, "[0, 1]")
    noise_candidates: int | None = option(None, "[1, inf]")
    screening_steps: int = option(4, "[1, inf]")
    seed: int = option(0, "[0, 9223372036854775807]")
    compare: bool = option(True, flags=("--compare/--no-compare",))
    best_of: int | None = option(None, "[1, inf]")
    dtype: str | None = option(None, choices=DTYPES)
    options: Any = option(None)

    def __post_init__(self) -> None:
        if self.particles is None and self.method in [*METHOD_OPTIONS]:  # an unknown method is refused below
            own = getattr(self.options, "num_particles", default_of(self.method, "num_particles"))
            object.__setattr__(self, "particles", own)
        super().__post_init__()
        object.__setattr__(self, "call", _call_text(self.call))
        options = self.options
        if options is None or isinstance(options, Mapping):
            options = method_settings(self.method, options or {}, self.particles)
        elif type(options) is not (kind := METHOD_OPTIONS[self.method].settings):
            raise InputError(f"options of {self.method} must be {kind.__name__}, got {type(options).__name__}")
        elif options.num_particles != self.particles:
            options = replace(options, num_particles=self.particles)
        object.__setattr__(self, "options", options)
        if self.original is not None and self.expand is None:
            raise InputError(
                "original is a share of the guidance of an expanded prompt: give expand too", "original", "expand"
            )
        if self.best_of is not None and not self.compare:
            raise InputError("best_of is an image beside the base images: leave it out, or compare", "best_of")
        if self.noise_candidates is not None and self.noise_candidates < self.particles:
            raise InputError(f"noise_candidates must be at least the particles, {self.particles}", "noise_candidates")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return the configuration of flat values: shared fields and options of the method; None is the default.

        Raises InputError for a value that does not fit, and for an option of another method.
        """
        given = {name: value for name, value in values.items() if value is not None}
        own = {name: given.pop(name) for name in [*given] if name not in SHARED}
        return cls(**given, options=own)

    def plain(self) -> dict[str, Any]:
        """Return all values by name in the form of JSON, the method's beside the shared ones."""
        names, options = self.option_names, self.options.plain()
        return {name: getattr(self, name) for name in SHARED} | {name: options[name] for name in names}

    @property
    def option_names(self) -> list[str]:
        """The options of the method."""
        return METHOD_OPTIONS[self.method].names

    @property
    def loading(self) -> dict[str, str]:
        """Arguments of `load_pipeline` that are given, besides model, device and dtype."""
        given = {"variant": self.variant, "config": self.model_config, "vae": self.vae, "scheduler": self.scheduler}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def call_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that no other setting gives, by name, as they were given."""
        named = {"negative_prompt": self.negative_prompt, "height": self.height, "width": self.width}
        others = {} if self.call is None else json.loads(self.call)
        return {name: value for name, value in named.items() if value is not None} | others


def _call_text(given: Any) -> str | None:
    """Return arguments of the call as the text of a JSON object; None for none. Raises InputError."""
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        arguments = given
    if not isinstance(arguments, Mapping | None):
        raise InputError(
            f"call must be arguments of the pipeline by name, such as {{guidance_rescale: 0.7}}, got {given!r:.60}",
            "call",
        )
    return json.dumps(dict(arguments)) if arguments else None


SHARED = [name for name in SamplingConfig.saved() if name != "options"]
OPTIONS_LISTED = "`steer sample --help` lists the options"
ALL_OPTIONS = list(dict.fromkeys(name for one in METHOD_OPTIONS.values() for name in one.names))


def method_settings(method: str, values: Mapping[str, Any], particles: int) -> CallSettings:
    """Return the settings of a method. Raises InputError for an option that it does not have."""
    settings, defaults, _ = METHOD_OPTIONS[method]
    names = METHOD_OPTIONS[method].names
    for name in values:
        if name not in names:
            if owners := methods_with(name):
                raise InputError(f"{name} is an option of {' and '.join(owners)}, not of {method}: leave it out", name)
            raise InputError(f"unknown option {name!r}: {did_you_mean(name, [*SHARED, *names], OPTIONS_LISTED)}")
    return settings(**{**defaults, **values, "num_particles": particles})


def choose_method(values: Mapping[str, Any], purpose: str | None = None, texts: bool = False) -> dict[str, Any]:
    """Return flat values with the method of a purpose, if they have no method.

    purpose  a key of PURPOSES; None: samples if an option is given that fk has and race lacks, else picture
    texts    whether the model generates texts, which race does not support

    Raises InputError for a purpose together with a method, and for the purpose picture with texts.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if "method" in given:
        if purpose is not None:
            raise InputError("purpose and method exclude each other: the purpose chooses the method, leave one out")
        return given
    only_fk = {*option_names("fk")} - {*option_names("race")}
    chosen = choose("purpose", purpose or ("samples" if texts or only_fk & given.keys() else "picture"), PURPOSES)
    if texts and chosen != "fk":
        raise InputError("purpose: a text has no search by look-ahead, use samples, or --method beam")
    return {"method": chosen, **given}


def option_names(method: str) -> list[str]:
    """Return the options of a method. Raises InputError for an unknown one."""
    return choose("method", method, METHOD_OPTIONS).names


def methods_with(name: str) -> list[str]:
    """Return the methods that have an option."""
    return [method for method, options in METHOD_OPTIONS.items() if name in options.names]


def owner_of(name: str) -> type[Settings]:
    """Return the dataclass of a setting; of an option of several methods, the first method's."""
    return SamplingConfig if name in SHARED else METHOD_OPTIONS[methods_with(name)[0]].settings


def default_of(method: str, name: str) -> Any:
    """Return the default of a method's option."""
    settings, defaults, _ = METHOD_OPTIONS[method]
    return defaults.get(name, settings.field(name).default)


def kinds_of(name: str, method: str | None = None) -> tuple[type, ...]:
    """Return the plain types of a setting, for `method` if that method has the option."""
    if name in SHARED:
        return plain_kinds(SamplingConfig.hints()[name])
    owners = methods_with(name)
    return plain_kinds(METHOD_OPTIONS[method if method in owners else owners[0]].settings.hints()[name])


def within_of(name: str) -> str | None:
    """Return the interval of a setting's numbers; None where it has none, or methods have different ones."""
    owners = [SamplingConfig] if name in SHARED else [METHOD_OPTIONS[method].settings for method in methods_with(name)]
    intervals = {owner.field(name).metadata["within"] for owner in owners}
    return intervals.pop() if len(intervals) == 1 else None


def flags_of(name: str) -> tuple[str, ...]:
    """Return the flags of a setting on the command line."""
    flags: tuple[str, ...] = owner_of(name).field(name).metadata["flags"]
    return flags or (f"--{name.replace('_', '-')}",)


def help_of(name: str) -> str:
    """Return the help of a setting on the command line: its first sentence, after the methods that have it."""
    if name in SHARED:
        default = SamplingConfig.field(name).default
        text = _sentence(SamplingConfig.help()[name])
        return (
            text[0].upper() + text[1:] + ("" if default is None or "by default" in text else f" [default: {default}]")
        )
    methods: dict[str, list[str]] = {}
    for method in methods_with(name):
        methods.setdefault(_sentence(METHOD_OPTIONS[method].settings.help()[name]), []).append(method)
    texts = "; ".join(f"{', '.join(names)}: {text}" for text, names in methods.items())
    defaults = {method: str(default_of(method, name)) for method in methods_with(name)}
    shown = ", ".join(f"{method} {default}" for method, default in defaults.items())
    if len(distinct := set(defaults.values())) == 1:
        shown = distinct.pop()
    return texts if shown in ("None", "False") else f"{texts} [default: {shown}]"


def _sentence(text: str) -> str:
    """Return the first sentence of a text."""
    return text.split(". ")[0].rstrip(".")


@contextmanager
def errors_with_flags() -> Iterator[None]:
    """Replace names of settings by flags of the command line in an InputError of the block."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for name in error.fields:
            option = "particles" if name == "num_particles" else name
            if option in (*SHARED, *ALL_OPTIONS):
                message = re.sub(rf"\b{name}\b", flags_of(option)[0].partition("/")[0], message, count=1)
        raise InputError(message) from error
