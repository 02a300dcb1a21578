"""The images of a lot and the buttons beneath them; label_view.js passes on which was pressed."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from steer.apps.demo.labelling import BAD, TIE, UNDO, name_of

IDLE = "Say who you are and press Start: the images to choose between appear here."
ARROWS = ("←", "→")


def lot_view(turn: int, lot: str, prompt: str, pictures: Sequence[bytes]) -> str:
    """Two to four images side by side.

    turn      another for each view, so that the page takes it for a new one
    lot       its name, which comes back with the answer
    pictures  PNG files
    """
    count = len(pictures)
    figures = "".join(_figure(number, count, prompt, picture) for number, picture in enumerate(pictures))
    none, better = ("Both bad", "better") if count == 2 else ("All bad", "best")
    rest = _button(TIE, "Tie", "T") + _button(BAD, none, "B") + _button(UNDO, "Undo", "U")
    return (
        f'<section class="steer-label" data-turn="{turn}" data-lot="{escape(lot, quote=True)}" tabindex="-1" '
        f'aria-label="{count} images to choose between">'
        f'<p class="steer-asked">Which is the {better} image of <q>{escape(prompt)}</q>?</p>'
        f'<div class="steer-lot steer-lot-{count}">{figures}</div>'
        f'<div class="steer-answers">{rest}</div></section>'
    )


def empty_view(turn: int, text: str = IDLE, undo: bool = False) -> str:
    """Where there are no images, why; with a button where the last answer can be taken back meanwhile."""
    button = f'<div class="steer-answers">{_button(UNDO, "Undo", "U")}</div>' if undo else ""
    return (
        f'<section class="steer-label" data-turn="{turn}" data-lot="">'
        f'<p class="steer-empty">{escape(text)}</p>{button}</section>'
    )


def _figure(number: int, count: int, prompt: str, picture: bytes) -> str:
    name = name_of(number, count).capitalize()
    alt = escape(f"{name}, of: {prompt}", quote=True)
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    key = ARROWS[number] if count == 2 else str(number + 1)
    return f'<figure><img src="{source}" alt="{alt}" data-image="{number}">{_button(str(number), name, key)}</figure>'


def _button(answer: str, text: str, key: str) -> str:
    shortcut = "ArrowLeft" if key == "←" else "ArrowRight" if key == "→" else key
    return (
        f'<button type="button" data-answer="{answer}" aria-keyshortcuts="{shortcut}">'
        f'{text} <kbd aria-hidden="true">{key}</kbd></button>'
    )
