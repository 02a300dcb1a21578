"""`steer rewards …`: list, look at, calibrate and train rewards. Heavy imports wait inside the commands."""

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)
IMAGES = click.option("--images", required=True, type=FOLDER, help="Folder of images: of `steer sample`, or any.")
PROMPT = click.option("--prompt", help="What all images were asked to show, where the folder does not say.")


@click.group(invoke_without_command=True)
@click.pass_context
def rewards(context: click.Context) -> None:
    """Lists the rewards that have a name; with a command, looks at rewards, calibrates or trains them."""
    from steer.reward import reward_names

    if context.invoked_subcommand is None:
        names = reward_names()
        width = max(map(len, names))
        for name, about in sorted(names.items()):
            click.echo(f"{name:{width}}  {about}")


@rewards.command()
@click.argument("reward")
@IMAGES
@PROMPT
def check(reward: str, images: Path, prompt: str | None) -> None:
    """Tests REWARD on images: contract, determinism, batches, gradient, speed. Exit code 1 where one fails."""
    from steer.apps.rewards_report import images_with_prompts, read_alike, render_findings
    from steer.rewards.checks import check_reward

    paths, prompts = images_with_prompts(images, prompt)
    batch, texts = read_alike(paths, prompts, 8)
    findings = check_reward(_load(reward), batch, texts)
    click.echo(render_findings(findings))
    if any(finding.passed is False for finding in findings):
        raise SystemExit(1)
