"""Suggestions for unknown names: the near ones alone, a short list, or the place of the list."""

import pytest

from steer.registry import MAX_LISTED, did_you_mean, near_names, nearest

SETTINGS = ("learning_rate", "kl_target_nats", "variant", "max_steps", "seed")
RESAMPLERS = ("systematic", "stratified", "residual", "ssp", "multinomial")


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("learning_rat", SETTINGS, ["learning_rate"]),
        ("systemic", RESAMPLERS, ["systematic"]),
        ("sys", RESAMPLERS, ["systematic", "ssp"]),  # an abbreviation, less alike than CUTOFF
        ("sy", RESAMPLERS, []),
        ("ImageReward", ("imagereward", "geneval", "Image"), ["imagereward", "Image"]),
        ("JPEG", ("jpeg", "jpeg-incompressible", "brisque"), ["jpeg", "jpeg-incompressible"]),
        ("n", SETTINGS, []),
        ("a", ("ab", "ac", "ad", "ae"), ["ae", "ad", "ac"]),
    ],
)
def test_near_names_are_alike_or_longer(name: str, known: tuple[str, ...], near: list[str]) -> None:
    assert near_names(name, known) == near


def test_a_name_is_suggested_once_and_far_ones_only_where_none_is_near() -> None:
    assert nearest("sed", ["seed", "seed", "model"]) == "seed"
    assert nearest("q", ["b", "a", "b"]) == "a or b"


def test_a_long_list_is_replaced_by_its_place() -> None:
    many = [f"name{number}" for number in range(MAX_LISTED + 1)]
    assert did_you_mean("q", many, "`steer rewards` lists them") == "`steer rewards` lists them"
    assert did_you_mean("q", many[1:], "…") == f"did you mean {' or '.join(sorted(many[1:]))}?"


def test_a_word_of_another_library_is_translated_where_the_name_exists() -> None:
    words = {"beta": "kl_weight", "seed": "generator=torch.Generator().manual_seed(seed)"}
    assert did_you_mean("beta", ["bias", "kl_weight"], "…", words) == "did you mean kl_weight?"
    assert did_you_mean("seed", ["generator"], "…", words) == f"did you mean {words['seed']}?"
    assert did_you_mean("beta", ["betas", "bias"], "…", words) == "did you mean betas?"
