"""Presets of the Steer tab: named settings, without prompt and seed, which stay in the visitor's browser.

A browser can return any text: saved settings are checked like a link's.
"""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from steer.apps.demo.steer_tab import SteerTab, defaults_of, fields_from_settings, settings_of
from steer.apps.demo.steering import given_options
from steer.apps.demo.studio import PRIVATE, Change, Studio, line, refusing
from steer.apps.recipes import checked_settings
from steer.apps.settings import SHARED
from steer.errors import InputError

BUILT_IN: dict[str, dict[str, Any]] = {  # fields that differ from the defaults of the method
    "Best picture": {"method": "race", "compare": True},
    "Fast": {"method": "best-of-n", "steps": 8, "compare": False},
    "Samples": {"method": "fk", "particles": 8, "auto": True, "compare": True},
}
KEPT = ("prompts", "seed", "fresh", "loras", "lora_weights")  # fields that no preset changes
MAX_PRESETS, MAX_NAME = 20, 40


def saved_presets(value: Any) -> dict[str, Any]:
    """Read the presets that a browser returned, without entries that this version cannot have written."""
    items = value.items() if isinstance(value, dict) else ()
    return {name: one for name, one in items if isinstance(name, str) and 0 < len(name) <= MAX_NAME}


class Presets:
    """The components and their events, above the fields of the Steer tab.

    saved  settings by name, in the browser
    """

    def __init__(self, studio: Studio, steer: SteerTab) -> None:
        self.studio, self.steer, self.status = studio, steer, steer.status
        # Presets are not secret: with a fixed word, a restarted app can read them again.
        self.saved = gr.BrowserState({}, storage_key="steer-presets", secret="steer")
        with steer.above_fields:
            self.name = gr.Dropdown(
                [*BUILT_IN],
                value=None,
                label="Preset",
                allow_custom_value=True,
                info="To save one, type a name first",
                min_width=150,
                elem_id="steer-preset",
            )
            self.save_button = gr.Button("Save", size="sm", scale=0, min_width=64, elem_id="steer-preset-save")
            self.delete_button = gr.Button("Delete", size="sm", scale=0, min_width=64, elem_id="steer-preset-delete")
        fields = [steer.status, steer.defaults, *steer.fields.values(), *steer.chips.components]
        asked = {self.name, self.saved, steer.weights, *steer.fields.values()}
        changed = [self.status, self.name, self.saved]
        self.name.input(self.choose, asked, fields, **PRIVATE)
        self.save_button.click(self.save, asked, changed, **PRIVATE)
        self.delete_button.click(self.delete, {self.name, self.saved}, changed, **PRIVATE)

    def show(self, saved: Any) -> Any:
        """List the presets of this browser."""
        return gr.update(choices=[*BUILT_IN, *saved_presets(saved)])

    @refusing
    def choose(self, given: Change) -> Change:
        """Set the fields that a preset has; a new name changes nothing."""
        name, saved, weights = given[self.name], saved_presets(given[self.saved]), given[self.steer.weights]
        if name in BUILT_IN:
            fields = BUILT_IN[name]
            values: Mapping[str, Any] = defaults_of(fields["method"], self.studio.models, weights) | fields
        elif name in saved:
            settings = checked_settings(saved[name])
            self.studio.check_reward(settings.reward)
            values = fields_from_settings("", settings, self.studio.models, weights)
        else:
            return {self.status: line(f"Press Save to keep the present settings as {name!r:.50}.")}
        values = {field: value for field, value in values.items() if field not in KEPT}
        return self.steer.fill(values, weights, f"Preset {name!r}: press Steer to run it.")

    @refusing
    def save(self, given: Change) -> Change:
        """Save the current settings under a name; they replace settings of the same name."""
        name, saved = str(given[self.name] or "").strip(), saved_presets(given[self.saved])
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InputError(f"preset: give it a name of 1 to {MAX_NAME} characters")
        if name in BUILT_IN:
            raise InputError(f"preset {name!r} is built in: type another name")
        if name not in saved and len(saved) >= MAX_PRESETS:
            raise InputError(f"{len(saved)} presets are saved, at most {MAX_PRESETS}: delete one")
        settings = settings_of(self.steer.values(given), given[self.steer.weights])
        if settings.lora is not None:
            raise InputError("a preset holds no finetuned weights or LoRA files: switch them off")
        return self._changed(saved | {name: given_options(settings, SHARED)}, name, f"Preset {name!r} saved.")

    @refusing
    def delete(self, given: Change) -> Change:
        name, saved = given[self.name], saved_presets(given[self.saved])
        if name not in saved:
            raise InputError("preset: choose one of yours to delete")
        return self._changed({one: saved[one] for one in saved if one != name}, None, f"Preset {name!r} deleted.")

    def _changed(self, saved: dict[str, Any], name: str | None, text: str) -> Change:
        return {
            self.saved: saved,
            self.name: gr.update(choices=[*BUILT_IN, *saved], value=name),
            self.status: line(text),
        }
