"""`steer finetune`: the command line. Heavy imports wait inside the command."""

from collections.abc import Sequence
from importlib.util import find_spec

import click

from steer.apps.cli.options import DEVICE, Command
from steer.apps.processes import is_main_process
from steer.assets import CONFIGS
from steer.errors import InputError

CONFIG = "steer.finetune.config"  # key of the context: the configuration that help describes


class FinetuneCommand(Command):
    """A command whose help lists the keys of the configuration that is named before `--help`."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Store the configuration for help, which is printed before arguments are read."""
        if args and not args[0].startswith("-"):
            context.meta[CONFIG] = args[0]
        return super().parse_args(context, args)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the keys of the configuration with their values in it."""
        super().format_options(context, formatter)
        if (name := context.meta.get(CONFIG)) is not None:
            check_installed()
            from steer.apps.finetuning import describe_keys

            with formatter.section(f"Keys of {name}"):
                formatter.write_dl(describe_keys(name))


def check_installed() -> None:
    """Raise InputError where a package of finetuning is missing."""
    if missing := [package for package in ("pydantic", "peft") if find_spec(package) is None]:
        raise InputError(f"finetuning needs {missing[0]}: pip install 'steer-diffusion[train]'")


@click.command(
    cls=FinetuneCommand,
    context_settings={"ignore_unknown_options": True},
    options_metavar="[--KEY VALUE …]",
    epilog=f"Embedded: {', '.join(CONFIGS)}. The file of prdp-sd15, in steer/assets/configs, explains each key.",
)
@click.argument("config")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="")
@DEVICE
@click.option("--resume", is_flag=True, help="Resume from the newest complete checkpoint; start if there is none.")
@click.option("--yes", is_flag=True, help="With `ask: true` in the configuration: answer the first question with yes.")
def finetune(config: str, overrides: tuple[str, ...], device: str | None, resume: bool, yes: bool) -> None:
    """Train a diffusion model on a reward. CONFIG is the name of an embedded configuration, or a YAML file.

    Any key of the configuration is also an option, which overrides the file: --max-steps 20 --beta 0.01
    --eval-rewards '[scene, jpeg]'. `steer finetune CONFIG --help` lists the keys of CONFIG, with their values.
    Paths are relative to the current folder.

    The run's folder, output_dir, contains the weights (best/, final/), checkpoints/, metrics.jsonl, evaluations.jsonl,
    config.yaml, samples/, plots/ and a model card. Ctrl-C ends the run with a checkpoint. With `ask: true` but no
    terminal, a run whose rewards disagree ends with a checkpoint and exit code 3.
    """
    if config.startswith("-"):
        raise InputError(f"{config}: the configuration comes first: steer finetune CONFIG --KEY VALUE …")
    words = parse_overrides(overrides) | ({} if device is None else {"device": device})
    check_installed()
    from steer.apps.asking import UNANSWERED_EXIT
    from steer.apps.finetuning import finetune as run
    from steer.apps.finetuning import read_config, summary
    from steer.pipelines.training.asking import UNANSWERED
    from steer.pipelines.training.trainer import INTERRUPTED

    config_values = read_config(config, words)
    result = run(config_values, resume, yes)
    if result.stopped == UNANSWERED:
        if is_main_process():
            click.echo(f"steer: update {result.step} needs an answer; to continue, add --resume --yes", err=True)
        raise SystemExit(UNANSWERED_EXIT)
    if result.stopped == INTERRUPTED:
        if is_main_process():
            click.echo(f"steer: interrupted at update {result.step}; run the command again with --resume", err=True)
        raise SystemExit(130)
    if is_main_process():
        click.echo(summary(config_values, result))


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Parse `--key value`, `--key=value` and, for true, `--key`. Raises InputError for a repeated key."""
    parsed: dict[str, str] = {}
    waiting = None  # a key whose value may follow
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key in parsed:
                raise InputError(f"--{name} is given twice and takes one value: give it once")
            parsed[key], waiting = (value, None) if equals else ("true", key)
        elif waiting is not None:
            parsed[waiting], waiting = word, None
        else:
            raise InputError(f"{word!r}: expected --KEY VALUE")
    return parsed
