"""Links that fill the form of the Steer tab: `?settings=` with a prompt and settings as JSON.

A link may come from a stranger: its values are checked for the types and ranges of a recipe, without loading anything.
"""

import json
from urllib.parse import urlencode

from steer.apps.demo.steering import given_options
from steer.apps.demo.studio import prompts_in
from steer.apps.recipes import checked_settings
from steer.apps.settings import SHARED, SamplingConfig
from steer.errors import InputError

PARAMETER = "settings"
MAX_CHARACTERS = 6000  # browsers and proxies truncate longer addresses


def link_of(prompt: str, settings: SamplingConfig) -> str:
    """Return the query of a link, with its `?`. Raises InputError for finetuned weights, and for a long prompt."""
    if settings.lora is not None:
        raise InputError("a link holds no finetuned weights: send the zip of the Finetune tab")
    data = {"prompt": prompt, "settings": given_options(settings, SHARED)}
    query = urlencode({PARAMETER: json.dumps(data, ensure_ascii=False, separators=(",", ":"))})
    if len(query) > MAX_CHARACTERS:
        raise InputError(f"a link of {len(query)} characters, at most {MAX_CHARACTERS}: send an image, which holds all")
    return f"?{query}"


def read_link(text: str) -> tuple[str, SamplingConfig]:
    """Read the decoded value of `?settings=`. Raises InputError for a value that `link_of` cannot have written."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"link: {len(text)} characters, at most {MAX_CHARACTERS}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"link: its settings are not JSON ({error!s:.80}); copy all of its address") from error
    if not isinstance(data, dict) or data.keys() != {"prompt", "settings"}:
        raise InputError("link: expected a prompt and settings; copy all of its address")
    prompt = data["prompt"]
    if not isinstance(prompt, str) or not prompt.isprintable() or not prompt.strip():
        raise InputError(f"link: the prompt must be one line of text, got {prompt!r:.60}")
    try:
        prompts_in(prompt, 1)
        return prompt, checked_settings(data["settings"])
    except InputError as error:
        raise InputError(f"link: {error}") from error
