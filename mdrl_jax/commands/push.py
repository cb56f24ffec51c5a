"""The command `push`: uploads a written model to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from mdrl_jax.errors import UserError
from mdrl_jax.model import hub, huggingface

UNWANTED = (".*", "*/.*", "lost+found/*")  # patterns of files that are not uploaded, by their path in the folder


def run(model: str, repo: str, private: bool = False, dry_run: bool = False, api: Any = None) -> None:
    """Uploads a model folder to a repository, which is made if needed, and prints where it is.

    Args:
      model: the folder, as `export` and `rollback` write it.
      repo: OWNER/NAME of the repository.
      private: whether a new repository is private.
      dry_run: whether the files are only listed, and nothing is sent.
      api: the client that is used, `huggingface_hub.HfApi` by default. It finds the token of `hf auth login`.

    Raises:
      UserError: if the folder holds no model that can be read, the name has another form, or the upload fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import filter_repo_objects, validate_repo_id

    folder = Path(model)
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UserError(f"--repo={repo} is not valid: {' '.join(str(e).split())}") from e
    if "/" not in repo:
        raise UserError(f"--repo={repo} is not valid; it must be OWNER/NAME")
    huggingface.read_config(folder)
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    place = lambda file: file.relative_to(folder).as_posix()  # noqa: E731
    files = list(filter_repo_objects(found, ignore_patterns=list(UNWANTED), key=place))
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{folder} has no *.safetensors; export a stage first")
    size = sum(file.stat().st_size for file in files)
    if dry_run:
        print(f"{len(files)} files, {size / 1e6:,.1f} MB, would go to https://huggingface.co/{repo}; nothing was sent")
        for file in files:
            print(f"  {place(file)}  {file.stat().st_size:,} bytes")
        return
    if not api and (away := hub.away()):
        raise UserError(f"nothing was uploaded to {repo}: {away}")
    client = api or HfApi()
    try:
        client.create_repo(repo, private=private, exist_ok=True)
        client.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=list(UNWANTED), commit_message="Upload by mdrl_jax"
        )
    except Exception as e:  # the hub and the network can fail in any way
        raise UserError(f"the upload to {repo} failed ({type(e).__name__}: {' '.join(str(e).split())})") from e
    print(f"{len(files)} files, {size / 1e6:,.1f} MB, are at https://huggingface.co/{repo}")
