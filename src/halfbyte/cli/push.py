"""halfbyte push: a run, a merged model or GGUF files to the Hugging Face hub."""

from typing import Annotated

import typer


def push(
    folder: Annotated[
        str, typer.Argument(help="A run's or a model's folder, or one with GGUF files.")
    ],
    repo: Annotated[str, typer.Argument(help="Its name on the hub: user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be uploaded.")
    ] = False,
) -> None:
    """Upload FOLDER to the hub with its model card: what others need, and no checkpoints.

    A file that holds what looks like a token or a key stops the upload. `hf auth login` first.
    """
    from halfbyte.cli.display import print_facts, quieten, size

    quieten()
    from halfbyte.export.push import push as upload

    result = upload(folder, repo, private=private, dry_run=dry_run)
    print_facts(
        f"{'would upload' if dry_run else 'uploaded'} to {result.repo}",
        {name: size(num_bytes) for name, num_bytes in result.files.items()},
    )
    if result.left_out:
        print(f"left out: {', '.join(result.left_out)}")
    for notice in result.notices:
        print(f"note: {notice}")
    if result.url:
        print(result.url)
